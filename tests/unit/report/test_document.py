"""Limits on fidelity figures."""

from mptq.report import QualityLimits


def fidelity(kl, ratio):
    return {"kl": {"mean": kl}, "perplexity": {"ratio": ratio}}


def rows(limits, figures):
    return [(row["name"], row["text"], row["met"]) for row in limits.check(figures)]


def test_a_limit_holds_for_held_out_text_and_for_the_unseen_kind():
    limits = QualityLimits(max_kl=0.02, max_ppl_increase=1.0)
    both = fidelity(0.01, 1.005) | {"unseen": fidelity(0.03, 1.02)}
    assert rows(limits, both) == [
        ("max_kl", "held_out", True),
        ("max_ppl_increase", "held_out", True),
        ("max_kl", "unseen", False),
        ("max_ppl_increase", "unseen", False),
    ]
    assert rows(limits, fidelity(0.01, 1.005) | {"unseen": None}) == [
        ("max_kl", "held_out", True),
        ("max_ppl_increase", "held_out", True),
    ]


def test_a_limit_without_figures_is_missed():
    assert rows(QualityLimits(max_kl=0.02), None) == [("max_kl", "held_out", False)]
    assert rows(QualityLimits(), fidelity(1.0, 2.0)) == []


def test_a_limit_is_met_by_a_value_equal_to_it():
    assert rows(QualityLimits(max_kl=0.5), fidelity(0.5, 1.0)) == [("max_kl", "held_out", True)]
