// A `str` argument of an op. torch's own conversion (torch/csrc/stable, 2.11 to 2.13) allocates a std::string
// at every call and never frees it.
#pragma once

#include <string>

#include <torch/csrc/stable/library.h>

namespace peft_fast {

struct Text : std::string {
  using std::string::string;
};

}  // namespace peft_fast

template <>
struct torch::stable::detail::ToImpl<peft_fast::Text> {
  static peft_fast::Text call(StableIValue value, uint64_t, bool) {
    StringHandle handle = to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    peft_fast::Text text(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};
