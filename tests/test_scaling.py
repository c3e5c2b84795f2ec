"""The scaling law against the golden numbers of the paper's code, and against scans of what it says."""

import math

import pytest

import vtok
from vtok.errors import InvalidValue
from vtok.scaling import ACCURACY, ALPHA, BETA, PUBLISHED, TOKENS, Law, fit, optimal_tokens


def error(n, t, a, alpha, beta, d):
    return a / n**alpha / t**beta + d


def sse(points, *law):
    return sum((error(n, t, *law) - y) ** 2 for n, t, y in points)


@pytest.mark.parametrize(
    ("n", "t", "expected"), [(0.5, 1, 0.5785090203), (7, 576, 0.4390055736), (1.8, 36, 0.5020678961)]
)
def test_golden_predictions(n, t, expected):
    assert Law(0.5, 0.08, 0.015, 0.05).predict(n, t) == pytest.approx(expected, abs=1e-10)


def test_the_points_are_the_table():
    assert len(PUBLISHED) == 28
    assert PUBLISHED[0] == (0.5, 1, 1 - 0.3855)
    assert PUBLISHED[-1] == (7.0, 576, 1 - 0.5354)
    assert all(len(row) == len(TOKENS) for row in ACCURACY.values())


def test_golden_fits():
    law = fit()
    assert (law.a, law.alpha, law.beta) == pytest.approx((0.5908, 0.07094, 0.01510), abs=5e-5)
    assert law.d == 0
    assert law.sse == pytest.approx(3.794e-4, abs=5e-8)
    law = fit(method="grid")
    assert (law.a, law.alpha, law.beta, law.d) == pytest.approx((0.5571, 0.0747, 0.0162, 0.0333), abs=5e-5)
    assert law.sse == pytest.approx(3.963e-4, abs=5e-8)


@pytest.mark.parametrize("method", ["least_squares", "grid"])
def test_the_reported_error_is_the_laws(method):
    law = fit(method=method)
    assert law.sse == pytest.approx(sse(PUBLISHED, law.a, law.alpha, law.beta, law.d), abs=1e-12)


def test_no_neighbour_of_the_fit_is_better():
    law = fit()
    for step in (1e-2, 1e-3, 1e-4):
        for da in (-step, 0, step):
            for dalpha in (-step, 0, step):
                for dbeta in (-step, 0, step):
                    for d in (0, step):
                        moved = sse(PUBLISHED, law.a + da, law.alpha + dalpha, law.beta + dbeta, d)
                        assert moved >= law.sse - 1e-12


@pytest.mark.parametrize("law", [(0.5, 0.08, 0.015, 0.05), (0.917, 0.0282, 0.0394, 0.0), (0.3, 0.9, 0.5, 0.1)])
def test_a_law_is_found_again(law):
    points = [(n, t, error(n, t, *law)) for n in (0.5, 2, 7, 14) for t in (1, 9, 100, 576)]
    found = fit(points)
    assert found.sse < 1e-12
    for n, t in ((1, 25), (30, 1000)):
        assert found.predict(n, t) == pytest.approx(error(n, t, *law), abs=1e-4)
    assert found.beta == pytest.approx(law[2], abs=2e-3)


def test_bounds_of_the_fit():
    flat = fit([(n, t, 0.4) for n in (1, 2) for t in (1, 2)])
    assert flat.predict(3, 3) == pytest.approx(0.4)
    rising = fit([(n, t, 0.1 * t) for n in (1, 2) for t in (1, 2, 3)])  # more tokens, more errors: no such law
    assert rising.beta == pytest.approx(0, abs=1e-6)
    assert rising.predict(1, 1) == pytest.approx(0.2, abs=1e-4)


@pytest.mark.parametrize("text", [0, 5, 14, 50, 400])
def test_optimal_tokens_is_the_best_split_of_any_budget(text):
    law = Law(0.6, ALPHA, BETA, 0.0)
    for flops in (1e11, 1e13):
        size, tokens = law.optimum(flops, text)
        assert 2e9 * size * (text + tokens) == pytest.approx(flops)
        assert tokens == law.optimal_tokens(text) == optimal_tokens(text)
        places = [v / 100 for v in range(100, 20000)]
        costs = {v: error(flops / (2e9 * (text + v)), v, law.a, law.alpha, law.beta, law.d) for v in places}
        assert min(costs, key=costs.get) == pytest.approx(tokens, abs=0.011)


def test_known_optima():
    assert optimal_tokens(50) == pytest.approx(12.1, abs=0.05)
    assert optimal_tokens(0) == 1  # the same text for all pictures can be computed once: then one token is best
    assert optimal_tokens(1) == 1


def test_reading_text_has_no_optimum():
    with pytest.raises(InvalidValue, match="as many as you can"):
        optimal_tokens(50, alpha=0.0282, beta=0.0394)
    with pytest.raises(InvalidValue):
        Law(0.9, 0.03, 0.03, 0.0).optimal_tokens(50)


def test_best_of_the_models_that_there_are():
    law = fit()
    for flops in (2e11, 1e12, 5e12):
        choices = []
        for n in (0.5, 1.8, 4.0, 7.0):
            t = math.floor(flops / (2e9 * n) - 30)
            if t >= 1:
                choices.append((error(n, t, law.a, law.alpha, law.beta, law.d), n, t))
        assert law.best(flops, 30, (7.0, 4.0, 1.8, 0.5)) == min(choices)[1:]
    with pytest.raises(InvalidValue, match="not enough"):
        law.best(1e10, 30, (0.5,))


def test_bad_input():
    for call in (
        lambda: fit(PUBLISHED[:3]),
        lambda: fit([(0, 1, 0.5)] * 4),
        lambda: fit([(1, 1, math.nan)] * 4),
        lambda: fit(method="random"),
        lambda: Law(0.5, 0.1, 0.1, 0).predict(0, 1),
        lambda: Law(0.5, 0.1, 0.1, 0).predict(1, -1),
        lambda: optimal_tokens(-1),
        lambda: optimal_tokens(True),
        lambda: optimal_tokens(1, alpha=0),
        lambda: fit().optimum(0, 10),
    ):
        with pytest.raises(InvalidValue):
            call()


@pytest.mark.parametrize(
    ("n", "d", "lr", "batch", "warns"),
    [
        (1e9, 1e11, 1.6325e-3, 1.10771e6, False),
        (7e9, 1.4e12, 9.16557e-4, 4.99882e6, True),
        (6e7, 2e9, 3.6513e-3, 118_663, False),
    ],
)
def test_the_step_law(n, d, lr, batch, warns, caplog):
    found = vtok.scaling.steplaw(n, d)
    assert (found.lr, found.batch_tokens) == pytest.approx((lr, batch), rel=2e-5)
    assert ("extrapolation" in caplog.text) is warns
    with pytest.raises(InvalidValue, match="tokens"):
        vtok.scaling.steplaw(n, 0)
