"""Budget files: what they mean, and the message for each mistake in one."""

import pytest

from longrun.errors import ConfigError, InputError, LongrunError
from longrun.plan.budget import Budget, shipped_budgets

FULL = """
[memory]
gpu = "80 GB"
host = "100 GiB"
[weights]
format = "nf4"
[kv]
format = "bf16"
retrieval_ratio = 0.25
sink_size = 0
recent_size = 1
page_size = 128
[prefill]
chunk_size = 4096
mode = "sparse"
mass = 0.9
dense_tokens = 0
[decode]
pages_per_head = 128
selector = "top"
"""


def test_every_key_is_read():
    assert Budget.parse(FULL, "mine") == Budget(
        device_bytes=80 * 10**9,
        host_bytes=100 * 2**30,
        weight_format="nf4",
        kv_format="bf16",
        retrieval_ratio=0.25,
        sink_size=0,
        recent_size=1,
        page_size=128,
        chunk_size=4096,
        prefill_mode="sparse",
        prefill_mass=0.9,
        prefill_dense=0,
        pages_per_head=128,
        selector="top",
        source="mine",
    )


def test_only_gpu_memory_is_required():
    budget = Budget.parse("[memory]\ngpu = 123456789\n")
    assert budget == Budget(device_bytes=123456789)
    assert (budget.host_bytes, budget.kv_format, budget.page_size, budget.chunk_size) == (0, "k5v3", 64, 1024)
    assert budget.weight_format is budget.retrieval_ratio is budget.sink_size is budget.recent_size is None


def test_shipped_budgets_load_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped_budgets() == ("a100-80g", "cpu", "h100-80g", "rtx4090-24g")
    for name in shipped_budgets():
        budget = Budget.load(name)
        assert budget.source == name
        assert budget.chunk_size % budget.page_size == 0
        assert budget.sink_size is budget.recent_size is None
        assert budget.weight_format == ("fp32" if name == "cpu" else "int4")
    assert Budget.load("a100-80g").device_bytes == 80 * 10**9


def test_file_by_path(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(FULL)
    assert Budget.load(path) == Budget.parse(FULL, str(path))


def test_unknown_name_lists_the_shipped_ones_and_the_nearest():
    with pytest.raises(InputError, match=r"a100-80g, cpu, h100-80g, rtx4090-24g \(nearest: a100-80g\)"):
        Budget.load("a100-80gb")


def test_unreadable_files(tmp_path):
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        Budget.load(tmp_path / "b.toml")
    with pytest.raises(InputError, match="neither a file"):
        Budget.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[memory]\ngpu = '80 GB'\nhost == 3", ["not valid TOML", "line 3"]),
        ("[memory]\ngpu = '80 GB'\nhost = [", ["not valid TOML", "line 3"]),
        ("", ["[memory] gpu is missing"]),
        ("[memroy]\ngpu = '80 GB'", ["[memroy]", "nearest: memory"]),
        ("memory = 3", ["memory = 3 is not a section"]),
        ("gpu = '80 GB'", ["gpu", "outside every section", "gpu under [memory]"]),
        ("weigth_format = 'int4'\n[memory]\ngpu = 1", ['= "int4"', "did you mean format under [weights]?"]),
        ("kvformat = 'int4'\n[memory]\ngpu = 1", ['kvformat = "int4"', "did you mean format under [kv]?"]),
        ("format = 'int4'", ['format = "int4"', "did you mean format under [weights] or format under [kv]?"]),
        ("memory_gpu = '80 GB'", ["outside every section", "did you mean gpu under [memory]?"]),
        ("[memory]\ndevice = '80 GB'", ["[memory] device is", "did you mean gpu?"]),
        ("[memory]\ndevice_bytes = 1", ["[memory] device_bytes is", "did you mean gpu?"]),
        ("[memory]\ngpu_bytes = 1", ["[memory] gpu_bytes is", "did you mean gpu?"]),
        ("wieghts = 'int4'", ["outside every section", "(nearest: [weights], which has format)"]),
        ("prefil = 64", ["[memory], [weights], [kv], [prefill], [decode] (nearest: [prefill], which has chunk_size, "]),
        (
            "zzz = 3",
            ["zzz = 3 stands outside every section", "[memory], [weights], [kv], [prefill], [decode] (nearest: ["],
        ),
        ("[memory]\nformat = 'int4'", ["[memory] format is", "format under [weights] or format under [kv]?"]),
        ("[weights]\nkv_format = 'int4'", ["[weights] kv_format is", "did you mean format under [kv]?"]),
        ("[weights]\npage_size = 64", ["[weights] page_size is", "did you mean page_size under [kv]?"]),
        ("[kv]\nkv_format = 'int4'", ["[kv] kv_format is", "did you mean format?"]),
        ("[memory]\ngpu = '80 GB'\nhots = 1", ["[memory] hots", "did you mean host?"]),
        ("[memory]\ngpu = '80 GB'\n[kv]\nchunksize = 1", ["[kv] chunksize", "chunk_size under [prefill]"]),
        ("[memory]\ngpu = '80 GB'\n[kv]\nzzz = 1", ["[kv] zzz", "[kv] has format, retrieval_ratio"]),
        ("[memory]\ngpu = '80 XB'", ["[memory] gpu", "'80 XB'", "80 GB or 100 GiB"]),
        ("[memory]\ngpu = -1", ["[memory] gpu", "-1", "negative"]),
        ("[memory]\ngpu = 0", ["[memory] gpu = 0", "at least 1"]),
        ("[memory]\ngpu = true", ["[memory] gpu", "true"]),
        ("[memory]\ngpu = 80.5", ["[memory] gpu", "80.5"]),
        ("[memory]\ngpu = '80 GB'\n[weights]\nformat = 'nf5'", ["[weights] format", '"nf5"', "nearest: nf4"]),
        ("[memory]\ngpu = '80 GB'\n[weights]\nformat = 4", ["[weights] format = 4", "fp32, bf16, int8, nf4"]),
        ("[memory]\ngpu = '80 GB'\n[kv]\nformat = 'INT4'", ["[kv] format", '"INT4"', "int4, k5v3, bf16, fp32"]),
        ("[memory]\ngpu = '80 GB'\n[kv]\nretrieval_ratio = 0", ["[kv] retrieval_ratio = 0", "above 0"]),
        ("[memory]\ngpu = '80 GB'\n[kv]\nretrieval_ratio = 1.5", ["retrieval_ratio = 1.5", "at most 1"]),
        ("[memory]\ngpu = '80 GB'\n[kv]\nretrieval_ratio = nan", ["retrieval_ratio = nan"]),
        ("[memory]\ngpu = '80 GB'\n[kv]\nretrieval_ratio = '50%'", ['retrieval_ratio = "50%"', "number"]),
        ("[memory]\ngpu = '80 GB'\n[kv]\nsink_size = -1", ["[kv] sink_size = -1", "at least 0"]),
        ("[memory]\ngpu = '80 GB'\n[kv]\nrecent_size = 0", ["[kv] recent_size = 0", "at least 1"]),
        ("[memory]\ngpu = '80 GB'\n[kv]\nrecent_size = 2.0", ["[kv] recent_size = 2.0", "whole number"]),
        (
            "[memory]\ngpu = '80 GB'\n[prefill]\nmode = 'dense'",
            ['[prefill] mode = "dense"', "use one of exact, sparse"],
        ),
        ("[memory]\ngpu = '80 GB'\n[prefill]\nmode = 1", ["[prefill] mode = 1", "use one of exact, sparse"]),
        ("[memory]\ngpu = '80 GB'\n[prefill]\nmass = 1", ["[prefill] mass = 1", "above 0 and below 1"]),
        ("[memory]\ngpu = '80 GB'\n[prefill]\nmass = 0.0", ["[prefill] mass = 0.0", "above 0 and below 1"]),
        ("[memory]\ngpu = '80 GB'\n[prefill]\nmass = nan", ["[prefill] mass = nan", "above 0 and below 1"]),
        ("[memory]\ngpu = '80 GB'\n[prefill]\nmass = '0.9'", ['[prefill] mass = "0.9"', "above 0 and below 1"]),
        ("[memory]\ngpu = '80 GB'\n[prefill]\nmass = true", ["[prefill] mass = true", "above 0 and below 1"]),
        ("[memory]\ngpu = '80 GB'\n[prefill]\ndense_tokens = -1", ["[prefill] dense_tokens = -1", "at least 0"]),
        ("[memory]\ngpu = '80 GB'\n[prefill]\ndense_tokens = '64K'", ['[prefill] dense_tokens = "64K"', "whole"]),
        ("[memory]\ngpu = '80 GB'\n[decode]\npages_per_head = 4", ["[decode] pages_per_head = 4", "at least 5"]),
        (
            "[memory]\ngpu = '80 GB'\n[decode]\npages_per_head = '128'",
            ['[decode] pages_per_head = "128"', 'number of pages: write one, a share like "25%", or "off"'],
        ),
        (
            "[memory]\ngpu = '80 GB'\n[decode]\npages_per_head = '0%'",
            ['[decode] pages_per_head = "0%" is no share above 0% and up to 100%'],
        ),
        (
            "[memory]\ngpu = '80 GB'\n[decode]\npages_per_head = '0.001%'",
            ['[decode] pages_per_head = "0.001%" is no share', 'hundredths of a percent: write it like "25%"'],
        ),
        (
            "[memory]\ngpu = '80 GB'\n[decode]\npages_per_head = 64.5",
            ["[decode] pages_per_head = 64.5", "whole number"],
        ),
        (
            "[memory]\ngpu = '80 GB'\n[decode]\nselector = 'best'",
            ['[decode] selector = "best"', "not a known selector: use one of top"],
        ),
        ("[memory]\ngpu = '80 GB'\n[decode]\nselect = 64", ["[decode] select is", "did you mean selector?"]),
        ("[memory]\ngpu = '80 GB'\n[kv]\npage_size = 48", ["[kv] page_size = 48", "16, 32, 64, 128, 256", "nearest"]),
        ("[memory]\ngpu = '80 GB'\n[kv]\npage_size = '64'", ["[kv] page_size", '"64"']),
        ("[memory]\ngpu = '80 GB'\n[prefill]\nchunk_size = 0", ["[prefill] chunk_size = 0", "at least 1"]),
    ],
)
def test_mistakes_name_file_key_value_and_way_out(tmp_path, text, words):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        Budget.load(path)
    message = str(error.value)
    for word in ["mine.toml", *words]:
        assert word in message
    assert "\n" not in message


def test_override_wins_and_speaks_of_options():
    budget = Budget.parse(FULL, "mine")
    changed = budget.override(kv_format="int4", weight_format=None, chunk_size=7)
    assert (changed.kv_format, changed.weight_format, changed.chunk_size) == ("int4", "nf4", 7)
    assert changed.source == "mine"
    assert budget.override(kv_format=None) is budget
    with pytest.raises(LongrunError, match=r"^options: \[kv\] format"):
        budget.override(kv_format="int3")
