"""What a compatibility report says: plain values, no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from kuea_mllm.errors import TowerMismatch

Verdict = Literal["ok", "warn", "refuse"]
Relation = Literal["same", "original", "descends", "sibling", "near", "far", "unrelated", "unknown"]


@dataclass(frozen=True)
class Check:
    """One comparison of what a base asks for with what a tower is.

    Attributes:
        name: What is compared, such as "width".
        base: The base's side, for people.
        tower: The tower's side.
        verdict: "ok", "warn" (it fits, but read this) or "refuse" (nothing is written).
        remedy: What a verdict other than "ok" means and what to do about it.
        can_force: Whether `--force` turns this refusal into a warning.
        forced: Whether it did.
        problem: The refusal as a clause, where "its <name> is <tower>, the base asks for <base>"
            would not read.
    """

    name: str
    base: str
    tower: str
    verdict: Verdict = "ok"
    remedy: str = ""
    can_force: bool = False
    forced: bool = False
    problem: str = ""


@dataclass(frozen=True)
class Lineage:
    """Whether the new tower descends from the one that the base holds.

    Attributes:
        relation: "same" weights; "original": held by the base before an earlier swap; "descends":
            its record names the base's tower as its start; "sibling": its record names a tower
            that the base held before; "near", "far", "unrelated": by the weights alone.
        evidence: One sentence that says what this rests on.
        weight_distance: `|new - base| / |base|` over all weights, None if the base's own tower
            could not be read.
        weight_cosine: Cosine between the weight matrices of both: 1 for equal ones, about 0 for
            independent trainings. Vectors are left out, because norms resemble each other anyway.
    """

    relation: Relation
    evidence: str
    weight_distance: float | None = None
    weight_cosine: float | None = None


@dataclass(frozen=True)
class Drift:
    """How far the outputs of the new tower are from those of the base's own, on probe images.

    Attributes:
        images: Number of probe images.
        image_source: Where they came from.
        tap: Which tokens were compared, in words.
        limit: Relative drift above which the report warns; lower for drawn images.
        tap_relative: `|new - base| / |base|` over the tokens that the MLLM reads.
        tap_cosine: Mean cosine of a token with the same token of the base's tower.
        embedding: As of `diagnostics.embedding_drift`: distances, cosine, the bound of
            Proposition 3.2; None where no side has a projection or pooling head.
        embedding_note: Whose projection was used.
    """

    images: int
    image_source: str
    tap: str
    limit: float
    tap_relative: float
    tap_cosine: float
    embedding: dict[str, float] | None = None
    embedding_note: str = ""


@dataclass(frozen=True)
class CompatibilityReport:
    """Everything that was compared before a swap.

    Attributes:
        checks: All comparisons, in reading order.
        lineage: None if shapes differ, so that nothing could be compared.
        drift: None if it was not measured; a check says why.
    """

    checks: tuple[Check, ...]
    lineage: Lineage | None = None
    drift: Drift | None = None

    @property
    def refusals(self) -> tuple[Check, ...]:
        """Checks that stand in the way."""
        return tuple(check for check in self.checks if check.verdict == "refuse")

    @property
    def warnings(self) -> tuple[Check, ...]:
        """Checks to read before the result is used; forced refusals are among them."""
        return tuple(check for check in self.checks if check.verdict == "warn")

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of all checks."""
        if self.refusals:
            return "refuse"
        return "warn" if self.warnings else "ok"

    def with_force(self) -> CompatibilityReport:
        """Return the report with those refusals that may be overridden turned into warnings."""
        checks = (
            replace(check, verdict="warn", forced=True)
            if check.verdict == "refuse" and check.can_force
            else check
            for check in self.checks
        )
        return replace(self, checks=tuple(checks))

    def require(self, where: str) -> None:
        """Stop at refusals.

        Raises:
            TowerMismatch: Naming the first refusal in full and the others by name.
        """
        if not self.refusals:
            return
        first, *others = self.refusals
        usual = f"its {first.name} is {first.tower}, the base asks for {first.base}"
        problem = f"the tower does not fit {where}: {first.problem or usual}."
        if others:
            problem += f" Other differences: {', '.join(check.name for check in others)}."
        remedy = first.remedy
        if all(check.can_force for check in self.refusals):
            remedy = f"{remedy} --force swaps all the same and records it.".strip()
        raise TowerMismatch(problem, remedy)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; what `kuea.json` keeps under "compatibility"."""
        content = asdict(self)
        content["checks"] = [asdict(check) for check in self.checks]
        return {"verdict": self.verdict, **content}
