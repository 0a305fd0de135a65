"""Proteins: the secondary structure of every residue, by an ESM-2 (`python examples/protein.py`).

The sequences are synthetic but structured: a hidden chain of helix, strand and coil, with lengths like those
of real ones, emits residues by how often each occurs in that state. The base learns one family; in the other,
that it is adapted to, the residues have changed their roles.
"""

import torch
from adaptation import Example, main, split
from torch import Tensor, nn
from transformers import EsmConfig, EsmForTokenClassification

RESIDUES, LENGTH = 20, 32
STAY = torch.tensor([0.88, 0.80, 0.70])
"""Of helix, strand and coil: the chance that the next residue is in the same state."""


def sequences(count: int, seed: int, shift: int) -> tuple[dict[str, Tensor], Tensor]:
    """Tokens [count, LENGTH] from 4 on, as ESM numbers residues, and states; `shift` renames the residues."""
    random = torch.Generator().manual_seed(seed)
    # A state prefers seven residues, neighbours of a ring, and takes the others too.
    ring = torch.arange(RESIDUES)
    preferred = torch.stack([(ring - 7 * state) % RESIDUES < 7 for state in range(3)])
    emission = preferred.double() * 6 + 1
    state = torch.randint(3, (count,), generator=random)
    states, tokens = [], []
    for _ in range(LENGTH):
        leaves = torch.rand(count, generator=random) > STAY[state]
        other = (state + torch.randint(1, 3, (count,), generator=random)) % 3
        state = torch.where(leaves, other, state)
        states.append(state)
        tokens.append(torch.multinomial(emission[state], 1, generator=random).squeeze(1))
    residues = (torch.stack(tokens, 1) + shift) % RESIDUES
    return {"input_ids": residues + 4}, torch.stack(states, 1)


def esm2() -> nn.Module:
    return EsmForTokenClassification(
        EsmConfig(
            vocab_size=33, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, position_embedding_type="rotary", token_dropout=False, num_labels=3,
            pad_token_id=1, mask_token_id=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def example() -> Example:
    one, other = split(*sequences(1200, 0, 0), 200), split(*sequences(1200, 1, 5), 200)
    return Example(esm2, one, other, 200, exclude=("contact_head.regression",))  # which has one output


EXAMPLES = {"esm2": example}

if __name__ == "__main__":
    main(EXAMPLES, "Secondary structure, adapted to a family with other residues.")
