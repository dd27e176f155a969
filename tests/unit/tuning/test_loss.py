"""Cross-entropy in chunks, only where something is predicted."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from kuea_mllm.tuning.loss import chunked_cross_entropy, supervised_positions

WIDTH, VOCABULARY = 8, 11


def case(rows: int, tokens: int, share: float, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, tokens, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    bias = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (rows, tokens), generator=generator)
    labels[torch.rand(rows, tokens, generator=generator) > share] = -100
    return hidden.float(), weight.float(), bias.float(), labels


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> torch.Tensor:
    logits = functional.linear(hidden, weight, bias)[:, :-1]
    return functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 3),
    tokens=st.integers(2, 17),
    share=st.sampled_from([0.1, 0.5, 1.0]),
    chunk=st.integers(1, 40),
    has_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_chunks_equal_the_plain_loss_in_value_and_gradient(
    rows: int, tokens: int, share: float, chunk: int, has_bias: bool, seed: int
) -> None:
    hidden, weight, bias, labels = case(rows, tokens, share, seed)
    found: list[tuple[torch.Tensor, ...]] = []
    for is_chunked in (True, False):
        states, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if is_chunked:
            places, targets = supervised_positions(labels)
            chosen = states.flatten(0, 1)[places]
            loss = chunked_cross_entropy(
                chosen, head, bias if has_bias else None, targets, chunk=chunk
            )
        else:
            loss = plain(states, head, bias if has_bias else None, labels)
        loss.backward()
        assert states.grad is not None
        gradient = torch.zeros_like(head) if head.grad is None else head.grad
        found.append((loss.detach(), states.grad, gradient))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


def test_nothing_to_predict_is_a_zero_that_reaches_the_model() -> None:
    hidden = torch.randn(0, WIDTH).requires_grad_()
    loss = chunked_cross_entropy(
        hidden, torch.randn(VOCABULARY, WIDTH), None, torch.zeros(0, dtype=torch.long), chunk=4
    )
    loss.backward()
    assert loss == 0
    assert hidden.grad is not None


def test_first_token_of_a_row_is_predicted_by_nothing() -> None:
    places, targets = supervised_positions(torch.tensor([[5, -100, 7], [8, 9, -100]]))
    assert places.tolist() == [1, 3]
    assert targets.tolist() == [7, 9]
