import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phi3v_train.mixture import mixture_counts, mixture_samples

sizes_lists = st.lists(st.integers(1, 30), min_size=1, max_size=5)
seeds = st.integers(0, 2**64 - 1)


@st.composite
def mixtures(draw):
    sizes = draw(sizes_lists)
    weights = draw(
        st.none()
        | st.lists(st.integers(0, 9), min_size=len(sizes), max_size=len(sizes)).filter(any)
    )
    return {
        "sizes": sizes,
        "weights": weights,
        "temperature": draw(st.sampled_from([0.5, 1.0, 2.0, 5.0])),
        "epoch_size": draw(st.none() | st.integers(1, 100)),
    }


def source_counts(samples, sizes):
    return np.histogram(samples, [0, *np.cumsum(sizes)])[0] if len(samples) else np.zeros(0)


@settings(max_examples=50, deadline=None)
@given(mixtures())
def test_the_counts_are_the_shares_to_less_than_one_and_their_sum_is_the_epoch(mixture):
    counts = mixture_counts(**mixture)
    shares = mixture["weights"] or mixture["sizes"]
    parts = [share ** (1 / mixture["temperature"]) if share else 0.0 for share in shares]
    total = mixture["epoch_size"] or sum(mixture["sizes"])
    assert counts.sum() == total
    for count, part in zip(counts.tolist(), parts, strict=True):
        assert abs(count - total * part / sum(parts)) < 1 + 1e-9
        assert count == 0 or part > 0


def test_what_is_left_goes_to_the_largest_fractions_and_of_equals_to_the_first():
    assert mixture_counts([10, 10, 10], weights=[1, 1, 1], epoch_size=10).tolist() == [4, 3, 3]
    assert mixture_counts([9, 9], weights=[1.5, 2.6], epoch_size=4).tolist() == [1, 3]
    assert mixture_counts([9, 9, 9], weights=[0.1, 0.2, 0.7], epoch_size=10).tolist() == [1, 2, 7]


def test_temperature_makes_shares_more_alike():
    def counts(temperature):
        return mixture_counts([900, 100], temperature=temperature, epoch_size=1000).tolist()

    assert counts(1) == [900, 100]
    assert counts(2) == [750, 250]  # 30 to 10
    assert counts(1e9) == [500, 500]


def test_without_weights_an_epoch_is_every_sample_once():
    samples = mixture_samples([4, 3, 5], seed=1, epoch=2)
    assert samples.tolist() == list(range(12))


@settings(max_examples=50, deadline=None)
@given(mixtures(), seeds, st.integers(0, 3))
def test_every_epoch_has_exactly_the_counts(mixture, seed, epoch):
    samples = mixture_samples(**mixture, seed=seed, epoch=epoch)
    assert (np.diff(samples) >= 0).all()
    counts = mixture_counts(**mixture)
    assert source_counts(samples, mixture["sizes"]).tolist() == counts.tolist()


@settings(max_examples=50, deadline=None)
@given(mixtures(), seeds, st.integers(1, 6))
def test_visits_of_a_source_differ_by_at_most_one_in_an_epoch_and_over_epochs(
    mixture, seed, num_epochs
):
    visits = np.zeros(sum(mixture["sizes"]), np.int64)
    bounds = np.cumsum(mixture["sizes"])[:-1]
    for epoch in range(num_epochs):
        samples = mixture_samples(**mixture, seed=seed, epoch=epoch)
        now = np.bincount(samples, minlength=len(visits))
        visits += now
        for counted in (now, visits):
            assert all(np.ptp(of_source) <= 1 for of_source in np.split(counted, bounds))


def test_what_an_epoch_leaves_out_comes_next():
    first, second = (mixture_samples([10], epoch_size=5, seed=0, epoch=e).tolist() for e in (0, 1))
    assert sorted(first + second) == list(range(10))
    assert first != list(range(5))


def test_another_seed_takes_other_samples():
    drawn = {tuple(mixture_samples([50], epoch_size=5, seed=s, epoch=0).tolist()) for s in range(9)}
    assert len(drawn) == 9


@settings(max_examples=40, deadline=None)
@given(mixtures(), seeds, st.data())
def test_only_usable_samples_occur_and_a_source_is_as_large_as_its_usable_part(mixture, seed, data):
    sizes = mixture["sizes"]
    firsts = np.cumsum([0, *sizes])[:-1]
    kept = [
        first + np.array(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1))))
        for first, size in zip(firsts, sizes, strict=True)
    ]
    samples = mixture_samples(**mixture, seed=seed, epoch=0, usable=np.concatenate(kept))
    assert set(samples.tolist()) <= set(np.concatenate(kept).tolist())
    counts = mixture_counts(**{**mixture, "sizes": [len(part) for part in kept]})
    assert source_counts(samples, sizes).tolist() == counts.tolist()


def test_a_source_of_weight_zero_may_be_empty_and_another_may_not():
    assert mixture_counts([0, 5], weights=[0, 1]).tolist() == [0, 5]
    with pytest.raises(ValueError, match="source 0 has no samples; leave it out"):
        mixture_counts([0, 5], weights=[1, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": [1]}, "expected 2 weights, one per source, got 1"),
        ({"weights": [1, -1]}, "finite, not negative and not all 0"),
        ({"weights": [0, 0]}, "finite, not negative and not all 0"),
        ({"weights": [1, float("nan")]}, "finite, not negative and not all 0"),
        ({"temperature": 0}, "temperature must be above 0 and finite, got 0"),
        ({"temperature": float("nan")}, "temperature must be above 0 and finite, got nan"),
        ({"epoch_size": 0}, "epoch_size must be at least 1, got 0"),
    ],
)
def test_what_makes_no_mixture_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        mixture_counts([3, 4], **arguments)


def test_equal_weights_are_equal_whatever_float_they_are():
    counts = mixture_counts([1, 1, 1], weights=[0.1, 0.1, 0.1], epoch_size=3 * 10**15)
    assert counts.tolist() == [10**15] * 3


def test_a_temperature_near_zero_leaves_the_largest_source_alone():
    assert mixture_counts([900, 100], temperature=1e-3, epoch_size=10).tolist() == [10, 0]
