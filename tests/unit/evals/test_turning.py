from typing import Any

from tasks.evals.report_text import turning_point

POINTS = [{"method": method, "distance": distance} for method in ("ppo", "best_of_n") for distance in ("1.0", "2.0")]


def _fit(form: str, alpha: float, beta: tuple[float, float, float], peak: float | None, share: float) -> dict[str, Any]:
    mean, low, high = beta
    return {"gold": {"form": form, "alpha": {"mean": alpha}, "beta": {"mean": mean, "low": low, "high": high},
                     "peak": peak, "peak_fraction": share}}  # fmt: skip


def test_a_peak_within_what_was_measured_is_over_optimisation() -> None:
    """α/2β = 1.5 of 2.0."""
    text = turning_point({"best_of_n": _fit("best_of_n", 1.2, (0.4, 0.3, 0.5), 1.5, 0.934)}, POINTS)
    assert text == (
        "Over-optimised: by the gold judge, best of n is best at √KL 1.5 and gets worse from there to 2.0, the "
        "farthest measured (β 0.40, 95% interval 0.30 to 0.50; 93% of resamples peak within it)."
    )


def test_a_peak_whose_beta_may_be_nothing_is_only_perhaps_one() -> None:
    text = turning_point({"ppo": _fit("rl", 1.2, (0.7, -0.1, 1.5), 1.9, 0.6)}, POINTS)
    assert text.startswith("Perhaps over-optimised: by the gold judge, PPO is best at √KL 1.9")
    assert "95% interval −0.10 to 1.50, which holds 0; 60% of resamples" in text


def test_curves_that_still_rise_are_listed_with_their_largest_distance() -> None:
    """A peak beyond 2.0 was not measured; −log d with β < 0 never has one."""
    rising = {
        "ppo": _fit("rl", 0.4, (-0.2, -0.5, 0.1), None, 0.0),
        "best_of_n": _fit("best_of_n", 1.2, (0.1, 0.0, 0.2), 6.0, 0.012),
    }
    text = turning_point(rising, POINTS)
    assert "still better at the farthest √KL of PPO (2.0) and best of n (2.0); at most 2% of the resamples" in text
    assert "none of the resamples" in turning_point({"ppo": rising["ppo"]}, POINTS)


def test_a_curve_that_ends_below_sft_is_no_gain() -> None:
    """2·(−0.5 + 0.1·log 2) is below 0, and β < 0 has no peak."""
    text = turning_point({"ppo": _fit("rl", -0.5, (-0.1, -0.2, 0.0), None, 0.0)}, POINTS)
    assert text == "By the gold judge's fitted curve, PPO ended no better than SFT."


def test_without_curves_there_is_nothing_to_say() -> None:
    assert turning_point({}, []) == ""
