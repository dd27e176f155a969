"""Graphics cards as data: memory and peak rates, for estimates."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kuea_mllm.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """One kind of device.

    Attributes:
        key: Name on the command line.
        name: Name for people.
        gib: Memory that torch reports as total, in GiB; a little less than on the box.
        bf16: Dense peak of matrix products in bfloat16 with float32 accumulation, in TFLOP/s.
        tf32: The same for float32 rounded to TF32.
        fp32: The same for plain float32, which the fp32 recipes use: TF32 stays off, as in the
            released code.
        link: Rate at which processes of one machine exchange tensors, in GB/s: an assumption
            (without peer-to-peer over the host's memory, else NVLink).
    """

    key: str
    name: str
    gib: float
    bf16: float
    tf32: float
    fp32: float
    link: float = 6.0

    @property
    def memory_bytes(self) -> int:
        """Total memory."""
        return int(self.gib * GIB)

    def flops_per_second(self, precision: str) -> float:
        """Return the peak in FLOP/s for "bf16" or "fp32"."""
        return 1e12 * (self.bf16 if precision == "bf16" else self.fp32)


# Rates: dense, without sparsity, from NVIDIA's documents: Ampere GA102 and Ada architecture
# white papers (appendix tables; GeForce tensor cores accumulate in float32 at half rate), data
# sheets of A100, L40S, H100 and H200. Memory: the total that torch names in its out-of-memory
# messages on these cards; the ends of the boxes (16, 24, 40, 48, 80, 141 GB) are never available.
CARDS: dict[str, Card] = {
    card.key: card
    for card in (
        Card("rtx3090", "RTX 3090", 23.6, 71.0, 35.6, 35.6),
        Card("rtx4090", "RTX 4090", 23.6, 165.2, 82.6, 82.6),
        Card("rtx4080", "RTX 4080", 15.6, 97.5, 48.7, 48.7),
        Card("l40s", "L40S", 44.4, 362.0, 183.0, 91.6, link=12.0),
        Card("a100-40", "A100 40 GB", 39.4, 312.0, 156.0, 19.5, link=200.0),
        Card("a100-80", "A100 80 GB", 79.1, 312.0, 156.0, 19.5, link=200.0),
        Card("h100", "H100 SXM", 79.1, 989.4, 494.7, 66.9, link=350.0),
        Card("h200", "H200 SXM", 139.8, 989.4, 494.7, 66.9, link=350.0),
    )
}


def card_of_device(name: str) -> Card | None:
    """Return the card that CUDA calls by this name, or None if it is not known.

    Args:
        name: As of `torch.cuda.get_device_name`, e.g. "NVIDIA GeForce RTX 4090".
    """
    # The longest match: "H100" must not take "H100 PCIe", whose rates differ.
    if "PCIe" in name and "A100" not in name:
        return None
    for card in CARDS.values():
        model = card.name.removesuffix(" SXM").partition(" GB")[0]
        words = model.rsplit(" ", 1)[0] if model.startswith("A100") else model
        if words in name and ("A100" not in words or f"{model.rsplit(' ', 1)[1]}GB" in name):
            return card
    return None


def card_or_device(name: str, memory_bytes: int) -> Card:
    """Return the card that CUDA calls by this name; if it is not known, one of that memory.

    The rates of the latter are those of an RTX 4090, so that hours planned on it say nothing.

    Args:
        name: As for `card_of_device`.
        memory_bytes: Of the device.
    """
    known = card_of_device(name)
    if known is not None:
        return known
    return replace(CARDS["rtx4090"], key=name, name=name, gib=memory_bytes / GIB)


def find_card(key: str) -> Card:
    """Return the card of a name.

    Raises:
        UserError: If it is not known; names those that are.
    """
    card = CARDS.get(key.lower())
    if card is None:
        raise UserError(f"card '{key}' is not known.", f"Known are: {', '.join(CARDS)}.")
    return card
