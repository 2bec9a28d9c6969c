import numpy as np
import pytest
import torch

from amg.evaluate import luminance_correlation, standardized_luminance


def pictures(count, seed, size=12):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def numpy_correlation(image, reference):
    weights = np.array([0.299, 0.587, 0.114])
    one, other = (np.tensordot(weights, p.double().numpy(), 1).ravel() for p in (image, reference))
    return np.corrcoef(one, other)[0, 1]


@pytest.mark.parametrize("flips", [False, True])
def test_value_and_row_equal_numpy_corrcoef_over_all_references(flips):
    images, references = pictures(5, 0), pictures(23, 1)
    value, row = luminance_correlation(images, references, flips=flips, block=7)
    for i, image in enumerate(images):
        oracle = [numpy_correlation(image, r) for r in references]
        if flips:
            mirrored = [numpy_correlation(image, r.flip(-1)) for r in references]
            oracle = [max(pair) for pair in zip(oracle, mirrored, strict=True)]
        assert value[i].item() == pytest.approx(max(oracle), abs=1e-5)
        assert row[i].item() == int(np.argmax(oracle))


def test_block_size_changes_nothing():
    images, references = pictures(4, 2), pictures(31, 3)
    whole = luminance_correlation(images, references)
    for block in (1, 8, 31):
        part = luminance_correlation(images, references, block=block)
        torch.testing.assert_close(part[0], whole[0], rtol=0, atol=1e-6)
        assert torch.equal(part[1], whole[1])


def test_a_recoloured_copy_is_still_a_copy():
    references = pictures(16, 4)
    recoloured = (references[9:10] * 0.4 + 0.3).flip(-1)
    value, row = luminance_correlation(recoloured, references)
    assert row.item() == 9
    assert value.item() == pytest.approx(1.0, abs=1e-5)
    assert luminance_correlation(recoloured, references, flips=False)[0].item() < 0.9


def test_ties_go_to_the_lowest_row():
    references = pictures(3, 5)[[0, 1, 2, 1, 1]]
    assert luminance_correlation(references[4:5], references, block=2)[1].item() == 1


def test_a_flat_picture_correlates_with_nothing():
    flat = torch.full((1, 3, 12, 12), 0.37)
    assert standardized_luminance(flat).abs().max().item() == 0.0
    assert luminance_correlation(flat, torch.cat([flat, pictures(2, 6)]))[0].item() == 0.0


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="height and width"):
        luminance_correlation(pictures(1, 0), pictures(1, 0, size=16))
    with pytest.raises(ValueError, match="`images` must be float"):
        luminance_correlation(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), pictures(1, 0, size=4))
    with pytest.raises(ValueError, match="`references` must be finite"):
        luminance_correlation(pictures(1, 0), pictures(1, 0) * float("nan"))
