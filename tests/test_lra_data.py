"""Long Range Arena's data: generators, readers of every layout, splits, shortcuts, cache, and what damage is told."""

from __future__ import annotations

import itertools
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture

from seqlib.errors import ConfigError, CorpusError
from seqlib.lra import lists, snakes
from seqlib.lra.prepare import prepare
from seqlib.lra.protocols import PROTOCOLS
from seqlib.lra.store import SPLITS, Examples
from seqlib.lra.tasks import TASKS
from seqlib.lra.tasks.base import split_order
from seqlib.lra.tasks.image import to_gray

VALUES = {
    "[MAX 2 9 [MIN 4 7 ] 0 ]": 9,
    "[SM 8 7 6 5 ]": 6,
    "[MED 1 2 3 4 ]": 2,
    "[MED 9 0 4 ]": 4,
    "[MED 3 8 ]": 5,
    "[SM [MED 7 2 2 9 ] [MAX 1 [SM 5 5 ] ] 3 ]": 8,
    "[MIN [MAX 3 6 ] [SM 9 9 9 ] [MED 5 8 8 ] 8 ]": 6,
    "[SM 3 [MIN 9 8 ] [MED 6 7 ] [MAX [SM 4 4 4 ] 1 ] 9 ]": 8,
    "[MED [SM 1 9 ] [SM 9 9 ] [MAX 0 0 ] [MIN 6 5 7 ] ]": 2,
    "[MAX [MED 0 1 ] [MIN [SM 7 3 ] 4 ] ]": 0,
    "7": 7,
}
SMALL = {"train": 60, "validation": 20, "test": 20, "max_depth": 4, "max_args": 4, "min_length": 4, "max_length": 40}


@pytest.mark.parametrize("text", VALUES)
def test_listops_values_and_both_text_forms(text: str) -> None:
    ids = lists.encode(text)
    assert lists.evaluate(ids) == VALUES[text] == lists.evaluate(np.frombuffer(ids, np.uint8))
    assert lists.decode(ids) == text and lists.encode(lists.stored(ids)) == ids
    assert lists.evaluate(ids, depth=9) == VALUES[text]


def test_shortcuts_ignore_deeper_lists() -> None:
    ids = lists.encode("[MAX 2 3 [MIN 8 [MAX 9 9 ] ] ]")
    assert [lists.evaluate(ids, depth) for depth in (1, 2, 3)] == [3, 8, 8]
    assert lists.evaluate(lists.encode("[MED [MAX 1 2 ] [MAX 5 6 ] ]"), 1, guesses=(0, 9, 4, 1)) == 4


def test_listops_has_the_published_distribution() -> None:
    """Figures of the exact generator: length, label prior and what shortcuts reach, within sampling error."""
    made = lists.generate(1200, seed=1)
    assert len(set(made)) == 1200 and made[:100] == lists.generate(100, seed=1) != lists.generate(100, seed=2)
    lengths = np.array([len(ids) for ids in made])
    assert lengths.min() > 500 and lengths.max() < 2000 and abs(lengths.mean() - 1061) < 45
    labels = np.array([lists.evaluate(ids) for ids in made])
    prior = np.array([0.169, 0.094, 0.077, 0.075, 0.096, 0.089, 0.075, 0.077, 0.080, 0.167])
    assert np.abs(np.bincount(labels, minlength=10) / 1200 - prior).max() < 0.035
    first = np.array([(0, 9, 4, 1)[lists.first_operator(ids)] for ids in made])
    assert abs((first == labels).mean() - 0.365) < 0.045
    for depth, expected in ((1, 0.487), (2, 0.686), (3, 0.792), (5, 0.918)):
        found = np.mean([lists.evaluate(ids, depth) == label for ids, label in zip(made, labels)])
        assert abs(found - expected) < 0.045, depth
    assert all(set(range(2, 11)) >= {len(arguments)} for ids in made[:50] for arguments in _arguments(ids))


def _arguments(ids: bytes) -> list[list[int]]:
    stack: list[list[int]] = []
    done = []
    for token in ids:
        if 11 <= token <= 14:
            stack.append([])
        elif token == 15:
            done.append(stack.pop())
            if stack:
                stack[-1].append(-1)
        else:
            stack[-1].append(token)
    assert not stack
    return done


def test_listops_shapes_that_cannot_be_filled() -> None:
    with pytest.raises(ConfigError, match="no length lies between"):
        lists.Shape(min_length=10, max_length=11)
    with pytest.raises(ConfigError, match="widen its lengths"):
        lists.generate(1000, lists.Shape(max_depth=2, max_args=2, min_length=3, max_length=5))


def listops_folder(folder: Path, n: int = 20) -> Path:
    folder.mkdir(parents=True)
    shape = lists.Shape(max_depth=4, max_args=4, min_length=4, max_length=40)
    made = lists.generate(3 * n, shape)
    for i, name in enumerate(("basic_train.tsv", "basic_val.tsv", "basic_test.tsv")):
        part = made[i * n : (i + 1) * n]
        lists.write_tsv(folder / name, part, [lists.evaluate(ids) for ids in part])
    return folder


@pytest.mark.parametrize("layout", ["listops-1000", "listops", "lra_release/lra_release/listops-1000", "archive"])
def test_listops_is_found_in_every_layout(layout: str, tmp_path: Path) -> None:
    source = tmp_path / "data"
    listops_folder(source / ("lra_release/listops-1000" if layout == "archive" else layout))
    if layout == "archive":
        with tarfile.open(tmp_path / "lra_release.gz", "w:gz") as archive:
            archive.add(source / "lra_release", "lra_release")
        source = tmp_path / "lra_release.gz"
    data = prepare("listops", data=source, any_size=True, cache=tmp_path / "cache")
    assert [len(data.splits[split]) for split in SPLITS] == [20, 20, 20] and data.vocab_size == 16
    row = data.splits["test"].sequence(3)
    assert lists.evaluate(row) == data.splits["test"].labels[3] and 15 in row


def test_split_counts_are_checked(tmp_path: Path) -> None:
    listops_folder(tmp_path / "listops")
    with pytest.raises(CorpusError, match="train has 20 examples, the published data 96,000"):
        prepare("listops", data=tmp_path, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.replace("Source\tTarget", "Label\tText"), r"basic_val.tsv:1: the header"),
        (lambda t: t.replace(" ]", "", 1), r"basic_val.tsv:\d+: \d+ lists are opened and \d+ closed"),
        (lambda t: t.replace("\t", "\t3\t", 2), r":2: expected Source<TAB>Target, found 3 columns|:1: the header"),
        (lambda t: t[:-9], r"basic_val.tsv:21: .* found no line end: the file is cut off"),
        (lambda t: t.replace("[MAX", "[MEAN"), r"'\[MEAN' is no symbol"),
        (lambda t: t[: t.rindex("\t")] + "\t12\r\n", r":21: the label must be a digit, got '12'"),
    ],
)
def test_damaged_listops_names_file_and_line(damage, message: str, tmp_path: Path) -> None:
    folder = listops_folder(tmp_path / "listops")
    path = folder / "basic_val.tsv"
    path.write_text(damage(path.read_bytes().decode()), newline="")
    with pytest.raises(CorpusError, match=message):
        prepare("listops", data=tmp_path, any_size=True, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_wrong_value_is_noticed(tmp_path: Path) -> None:
    folder = listops_folder(tmp_path / "listops")
    lines = (folder / "basic_test.tsv").read_bytes().decode().split("\r\n")
    text, _, label = lines[1].rpartition("\t")
    lines[1] = f"{text}\t{(int(label) + 1) % 10}"
    (folder / "basic_test.tsv").write_text("\r\n".join(lines), newline="")
    with pytest.raises(CorpusError, match=r"basic_test.tsv:2: the list evaluates to"):
        prepare("listops", data=tmp_path, any_size=True, cache=tmp_path / "cache")


def test_truncated_archive(tmp_path: Path) -> None:
    listops_folder(tmp_path / "lra_release" / "listops-1000", n=200)
    whole, cut = tmp_path / "lra_release.gz", tmp_path / "cut.gz"
    with tarfile.open(whole, "w:gz") as archive:
        archive.add(tmp_path / "lra_release", "lra_release")
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(CorpusError, match="cut off or no tar archive"):
        prepare("listops", data=cut, any_size=True, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_shortcut_table_of_generated_data(tmp_path: Path) -> None:
    data = prepare("listops", generate=SMALL | {"train": 600, "test": 300}, cache=tmp_path)
    found = TASKS["listops"].baselines(data.splits)
    depths = [found[f"lists to depth {k}"] for k in (1, 2, 3)]
    assert found["majority class"] <= found["first operator"] <= max(depths) and depths[-1] == 1.0
    assert depths == sorted(depths)


def test_second_start_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    first = prepare("listops", generate=SMALL, cache=tmp_path)
    monkeypatch.setattr(type(TASKS["listops"]), "generate", None)
    again = prepare("listops", generate=SMALL, cache=tmp_path)
    for split in SPLITS:
        for a, b in zip(_arrays(first.splits[split]), _arrays(again.splits[split])):
            assert np.array_equal(a, b)
    assert not again.splits["train"].tokens.flags.owndata  # memory-mapped
    rows = datasets.Dataset.from_file(str(next(tmp_path.glob("*/test.arrow"))))
    assert rows[0]["input_ids"] == first.splits["test"].sequence(0).tolist()
    monkeypatch.undo()
    other = prepare("listops", generate=SMALL, seed=1, cache=tmp_path)
    assert not np.array_equal(other.splits["test"].tokens, first.splits["test"].tokens)


def _arrays(part: Examples) -> tuple[np.ndarray, ...]:
    return part.tokens, part.offsets, part.labels


def test_damaged_cache_says_so(tmp_path: Path) -> None:
    prepare("listops", generate=SMALL, cache=tmp_path)
    path = next(tmp_path.glob("*/test.arrow"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CorpusError, match="damaged"):
        prepare("listops", generate=SMALL, cache=tmp_path)


def test_unknown_options() -> None:
    with pytest.raises(ConfigError, match="no option depth"):
        prepare("listops", generate={"depth": 3})
    with pytest.raises(ConfigError, match="unknown task 'list'"):
        prepare("list")
    with pytest.raises(ConfigError, match="unknown protocol"):
        prepare("listops", "s5")


@pytest.mark.parametrize("size", [16, 32])
def test_pathfinder_images_follow_their_geometry(size: int) -> None:
    shape = snakes.SIZES[size]
    made = snakes.draw(np.random.default_rng(0), 60, shape)
    assert made.pixels.shape == (60, size, size) and made.pixels.max((1, 2)).min() == 255
    assert 0.25 < made.labels.mean() < 0.75
    contour = made.paddles[:, :, 4]
    assert ((contour == 0).sum(1) == shape.paddles).all() and ((contour == 1).sum(1) == shape.paddles).all()
    reach = shape.length + 2 * shape.margins[0]
    for paddles, label, discs in zip(made.paddles, made.labels, made.discs):
        ends = [[p[:4] for p in paddles if p[4] == which] for which in (0, 1)]
        for chain in ends:
            for a, b in itertools.pairwise(chain):
                assert np.hypot(*(b[:2] - a[:2])) <= reach + shape.margins[0] + 1e-3
                assert abs(np.hypot(*(a[2:] - a[:2])) - shape.length) < 1e-3
        tips = {(tuple(chain[0][:2]), tuple(chain[-1][2:])) for chain in ends}
        assert ((tuple(discs[0]), tuple(discs[1])) in tips) == bool(label)
    inside = made.paddles[contour >= 0][:, :4]
    assert inside.min() >= 0 and inside.max() <= size - 1


def test_pathfinder_contours_keep_apart() -> None:
    shape = snakes.SIZES[32]
    made = snakes.draw(np.random.default_rng(1), 20, shape)
    for paddles in made.paddles:
        points = {
            which: np.concatenate([np.linspace(p[:2], p[2:4], 5) for p in paddles if p[4] == which])
            for which in np.unique(paddles[:, 4])
            if which >= 0
        }
        for a, b in itertools.combinations(points, 2):
            gaps = np.hypot(*(points[a][:, None] - points[b][None]).transpose(2, 0, 1))
            assert gaps.min() > 0.9


def test_pathfinder_is_repeatable_and_unaffected_by_processes() -> None:
    shape = snakes.SIZES[16]
    a, labels = snakes.pathfinder(40, shape, seed=3)
    b, _ = snakes.pathfinder(40, shape, seed=3)
    c, _ = snakes.pathfinder(40, shape, seed=4)
    assert np.array_equal(a, b) and not np.array_equal(a, c) and a.dtype == np.uint8 and labels.dtype == np.int16


def noise_images(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    return rng.integers(0, 256, (n, 32, 32)).astype(np.uint8), rng.integers(0, 2, n).astype(np.int16)


def pathfinder_folder(folder: Path, n: int = 40) -> Path:
    pixels, labels = noise_images(n)
    (folder / "metadata").mkdir(parents=True)
    for k in range(2):
        (folder / "imgs" / str(k)).mkdir(parents=True)
        part = range(k * n // 2, (k + 1) * n // 2)
        lines = [f"imgs/{k} sample_{i}.png {i} {labels[i]} 1.0 14 4 2 0.5 1 1" for i in part]
        (folder / "metadata" / f"{k}.npy").write_text("\n".join(lines) + "\n")
        for i in part:
            Picture.fromarray(pixels[i]).save(folder / "imgs" / str(k) / f"sample_{i}.png")
    return folder


@pytest.mark.parametrize("where", ["pathfinder32", "pathfinder/pathfinder32", "lra_release/pathfinder32"])
def test_pathfinder_release_and_its_three_splits(where: str, tmp_path: Path) -> None:
    pathfinder_folder(tmp_path / where / "curv_contour_length_14")
    pixels, labels = noise_images(40)
    for protocol in ("lra", "s4", "seqlib"):
        data = prepare("pathfinder", protocol, data=tmp_path, any_size=True, cache=tmp_path / "cache")
        order = split_order(40, (4, 4), PROTOCOLS[protocol].image_split)
        assert sorted(np.concatenate(order)) == list(range(40))
        for split, part in zip(SPLITS, order):
            assert np.array_equal(data.splits[split].tokens.reshape(-1, 32, 32), pixels[part])
            assert np.array_equal(data.splits[split].labels, labels[part])
    assert np.array_equal(split_order(40, (4, 4), "order")[0], np.arange(32))


def test_split_of_s4_is_torchs_random_split() -> None:
    import torch

    parts = torch.utils.data.random_split(range(50), [40, 5, 5], torch.Generator().manual_seed(42))
    assert [part.indices for part in parts] == [part.tolist() for part in split_order(50, (5, 5), "torch-42")]


def test_unreadable_image_names_file_and_line(tmp_path: Path) -> None:
    folder = pathfinder_folder(tmp_path / "pathfinder32" / "curv_contour_length_14")
    (folder / "imgs" / "1" / "sample_22.png").write_bytes(b"")
    with pytest.raises(CorpusError, match=r"metadata/1.npy:3: image .*sample_22.png cannot be read"):
        prepare("pathfinder", data=tmp_path, any_size=True, cache=tmp_path / "cache")
    (folder / "metadata" / "0.npy").write_text("imgs/0 sample_0.png 0 7\n")
    with pytest.raises(CorpusError, match=r"metadata/0.npy:1: expected"):
        prepare("pathfinder", data=tmp_path, any_size=True, cache=tmp_path / "cache")


def imdb_folder(root: Path, n: int = 40) -> Path:
    for split, sentiment in itertools.product(("train", "test"), ("neg", "pos")):
        folder = root / "aclImdb" / split / sentiment
        folder.mkdir(parents=True)
        for i in range(n // 2):
            word = "bad" if sentiment == "neg" else "good"
            (folder / f"{i}_{1 if sentiment == 'neg' else 9}.txt").write_text(f"{split} {i}: a {word} film é " * 3)
    return root


def test_text_units_and_validation(tmp_path: Path) -> None:
    root = imdb_folder(tmp_path / "data")
    ours = prepare("text", data=root, any_size=True, cache=tmp_path / "c")
    assert [len(ours.splits[split]) for split in SPLITS] == [36, 4, 40] and ours.vocab_size == 257
    text = bytes((ours.splits["train"].sequence(0) - 1).astype(np.uint8)).decode()
    assert text.startswith("train ") and "é" in text
    published = prepare("text", "s4", data=root, any_size=True, cache=tmp_path / "c")
    assert np.array_equal(published.splits["validation"].tokens, published.splits["test"].tokens)
    assert published.splits["test"].sequence(0).max() < published.vocab_size < 60  # characters that occur often
    found = TASKS["text"].baselines(ours.splits)
    assert found["majority class"] <= 0.6 and found["bag of tokens, linear"] == 1.0
    (root / "aclImdb" / "train" / "neg" / "3_1.txt").write_text("")
    with pytest.raises(CorpusError, match="3_1.txt is empty"):
        prepare("text", "nys", data=root, any_size=True, cache=tmp_path / "c")


def aan_folder(root: Path, n: int = 12) -> Path:
    (root / "tsv_data").mkdir(parents=True)
    for name in ("train", "eval", "test"):
        rows = [f'{i % 2}.0\t{i}\t{i + 1}\t"quoted text {i}\tother text {i}' for i in range(n)]
        (root / "tsv_data" / f"new_aan_pairs.{name}.tsv").write_text("\n".join(rows) + "\n")
    return root


def test_retrieval_pairs(tmp_path: Path) -> None:
    data = prepare("retrieval", data=aan_folder(tmp_path / "data"), any_size=True, cache=tmp_path / "c")
    part = data.splits["validation"]
    assert part.width == 2 and len(part) == 12 and part.labels.tolist() == [0, 1] * 6
    texts = [bytes((part.sequence(5, which) - 1).astype(np.uint8)).decode() for which in (0, 1)]
    assert texts == ['"quoted text 5', "other text 5"]
    assert part.take(np.array([5])).sequence(0, 1).tolist() == part.sequence(5, 1).tolist()
    assert set(TASKS["retrieval"].baselines(data.splits)) == {"majority class", "bag of tokens, linear"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1.0\t3\t4", "found 3 columns; the files with ids only lack the texts"),
        ("2.0\t3\t4\ta\tb", "the label must be"),
        ("1.0\t3\t4\ta\t", "a text of the pair is empty"),
        ("1.0\t3\t4\ta\tb\tc", "found 6 columns"),
    ],
)
def test_damaged_pairs(line: str, message: str, tmp_path: Path) -> None:
    root = aan_folder(tmp_path / "data")
    path = root / "tsv_data" / "new_aan_pairs.eval.tsv"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(CorpusError, match=rf"eval.tsv:13: .*{message}"):
        prepare("retrieval", data=root, any_size=True, cache=tmp_path / "c")
    path.write_text("1.0\t3\t4\ta\tb")
    with pytest.raises(CorpusError, match=r"eval.tsv:1: no line end"):
        prepare("retrieval", data=root, any_size=True, cache=tmp_path / "c")


def test_gray_is_truncated_or_rounded() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32)).astype(np.uint8)
    rounded = np.stack([np.asarray(Picture.fromarray(a.transpose(1, 2, 0)).convert("L")) for a in rgb])
    assert np.array_equal(to_gray(rgb, "rounded"), rounded)
    white = np.full((1, 3, 2, 2), 255, np.uint8)
    assert to_gray(white, "truncated").min() == 255 == to_gray(white, "rounded").min()


def test_gray_of_the_lra_protocol_is_tensorflows() -> None:
    """Values of tf.image.rgb_to_grayscale, where another order or precision of the sum gives other ones."""
    known = np.array([
        (24, 133, 189, 107), (67, 239, 82, 170), (78, 153, 67, 121), (81, 152, 3, 114), (88, 251, 149, 191),
        (94, 249, 21, 177), (103, 143, 158, 133), (139, 139, 163, 142), (142, 138, 99, 135), (146, 249, 51, 196),
        (152, 103, 253, 135), (168, 199, 207, 191), (0, 0, 0, 0), (255, 255, 255, 255),
    ], np.uint8)  # fmt: skip
    assert to_gray(known[:, :3, None, None], "truncated").ravel().tolist() == known[:, 3].tolist()


def test_cifar_batches(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        values = {b"data": rng.integers(0, 256, (10, 3072)).astype(np.uint8), b"labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(values))
    data = prepare("image", data=tmp_path / "data", any_size=True, cache=tmp_path / "c")
    assert [len(data.splits[split]) for split in SPLITS] == [45, 5, 10] and data.seqlen == 1024 and data.pad is None
    (folder / "data_batch_3").write_bytes(pickle.dumps(Path("x")))
    with pytest.raises(CorpusError, match="does not belong into a CIFAR-10 file"):
        prepare("image", "lra", data=tmp_path / "data", any_size=True, cache=tmp_path / "c")


def mega_folder(folder: Path, labels: list[str], *sources: list[str]) -> Path:
    kinds = [("label", "label", labels), *((k, "src", v) for k, v in zip(("input", "input1"), sources))]
    for kind, ending, lines in kinds:
        (folder / kind).mkdir(parents=True)
        for split in ("train", "valid", "test"):
            (folder / kind / f"{split}.{ending}").write_text("\n".join(lines) + "\n")
    return folder


def test_mega_layout(tmp_path: Path) -> None:
    mega_folder(tmp_path / "d" / "text", ["1", "0"], ["5 7 255", "3 3"])
    data = prepare("text", data=tmp_path / "d", any_size=True, cache=tmp_path / "c")
    assert data.splits["validation"].sequence(0).tolist() == [5, 7, 255]
    assert data.manifest["facts"] == {"layout": "mega"} and data.pad == 256 and data.vocab_size == 257
    mega_folder(tmp_path / "d" / "retrieval", ["1", "0"], ["5 7", "3"], ["2", "4 4 4"])
    pairs = prepare("retrieval", data=tmp_path / "d", any_size=True, cache=tmp_path / "c").splits["test"]
    assert pairs.sequence(1, 0).tolist() == [3] and pairs.sequence(1, 1).tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("label/valid.label", "1\n", r"input/valid.src has 2 lines and .*valid.label 1"),
        ("input1/test.src", "1 2\n3\n4\n", r"input1/test.src has 3 lines and .*test.label 2"),
        ("label/valid.label", "1\n2\n", r"valid.label:2: label 2 is out of range 0 .. 1"),
        ("input/train.src", "1 2\n3 x\n", r"input/train.src:2: not integers"),
        ("input/train.src", "1 2\n\n", r"input/train.src:2: expected one or more integers"),
        ("input1/train.src", None, r"input1/train.src is missing"),
    ],
)
def test_damaged_mega_pairs_name_file_and_line(name: str, text: str | None, message: str, tmp_path: Path) -> None:
    folder = mega_folder(tmp_path / "d" / "retrieval", ["1", "0"], ["5 7", "3"], ["2", "4 4 4"])
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises(CorpusError, match=message):
        prepare("retrieval", data=tmp_path / "d", any_size=True, cache=tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("pixels", "message"), [("7 " * 1023, "found 1023, the largest 7"), ("7 " * 1023 + "256", "the largest 256")]
)
def test_images_of_another_size_or_range(pixels: str, message: str, tmp_path: Path) -> None:
    for task in ("image", "pathfinder"):
        mega_folder(tmp_path / "d" / task, ["1"] * 2, ["1 " * 1024, pixels])
        with pytest.raises(CorpusError, match=rf"train.src:2: expected 1024 pixels from 0 to 255, .*{message}"):
            prepare(task, data=tmp_path / "d", any_size=True, cache=tmp_path / "c")


@pytest.mark.parametrize("task", ["listops", "retrieval", "pathfinder", "pathx", "pathfinder256"])
def test_missing_files_are_named(task: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="It needs .*(tsv|imgs)"):
        prepare(task, data=tmp_path, cache=tmp_path / "c")
    with pytest.raises(CorpusError, match="does not exist"):
        prepare(task, data=tmp_path / "nowhere", cache=tmp_path / "c")
