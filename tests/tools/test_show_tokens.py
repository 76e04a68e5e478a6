"""The picture of token compression: groups, skipped patches, and what is put back."""

import numpy as np
import pytest
import torch
from jobs import run, save_model
from PIL import Image

from models import build_vit
from models.tokens import SKIPPED, DenseTokenMerge, TokenMerge
from pruning import pm_vit, token_merging
from runtime.errors import BadArguments
from tools import show_tokens


@pytest.fixture
def compressed(tiny, tmp_path):
    """Path of a tiny model with 6 of 16 patches left."""
    structure = pm_vit.choose_centres(torch.rand(2, 16), range(2), 0.2, 0.4)
    model = token_merging.compress(build_vit(**tiny), structure, token_merging.Merging())
    save_model(tmp_path / "c.pth", model)
    return tmp_path / "c.pth"


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(np.random.randint(0, 256, (40, 30, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize("shortcut", [False, True])
def test_pixels_go_through_the_matrices(tiny, shortcut):
    structure = pm_vit.choose_centres(torch.rand(1, 16), (0,), 0.2, 0.4)
    tokens = TokenMerge(2 + 6, 18, 2)
    tokens.set(*token_merging.assign_patches(structure, 0, (4, 4), 2, token_merging.Merging(shortcut=shortcut)))
    pixels = torch.rand(16, 16, 3)
    groups, back, owner = show_tokens.pictures(tokens, pixels, (4, 4))
    flat = show_tokens.patches_of(pixels, (4, 4)).flatten(1)
    stream = torch.cat([torch.zeros(2, flat.shape[1]), flat])[None]
    z = tokens.compress(stream)
    expected = tokens.restore(z, z, stream)[0, 2:].detach()
    torch.testing.assert_close(show_tokens.patches_of(back, (4, 4)).flatten(1), expected.clamp(0, 1))
    shown = show_tokens.patches_of(groups, (4, 4))
    assert (shown[owner == SKIPPED] == 1).all()
    colours = shown[:, 0, 0]
    assert all(torch.equal(colours[i], colours[j]) for i in range(16) for j in range(16) if owner[i] == owner[j])
    if not shortcut:
        full = DenseTokenMerge(8, 18, 2)
        full.set(tokens)
        torch.testing.assert_close(show_tokens.pictures(full, pixels, (4, 4))[1], back)


def test_a_picture_is_written(compressed, photo, tmp_path, capsys):
    run(show_tokens, compressed, photo, "--output", tmp_path / "out.png")
    assert "2 compressed blocks" in capsys.readouterr().out
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width > 1000 and np.asarray(picture.convert("L")).std() > 10


def test_mistakes(compressed, photo, tiny, tmp_path):
    save_model(tmp_path / "dense.pth", build_vit(**tiny))
    for flags, words in (
        ([tmp_path / "dense.pth", photo], "has no token structure"),
        ([compressed, compressed], "is no image that can be read"),
        ([compressed, photo, "--output", tmp_path / "no" / "x"], "there is no folder"),
    ):
        with pytest.raises(BadArguments, match=words):
            run(show_tokens, *flags)
