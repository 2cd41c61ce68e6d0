import os

import pytest

from synthlong.preparation.memory import usable_memory_gb

MACHINE_GB = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


@pytest.mark.parametrize(
    ("groups", "limits", "usable"),
    [
        ("0::/job/step", {"job/memory.max": "3000000000", "job/step/memory.max": "max"}, 3.0),
        ("0::/job/step", {"job/memory.max": "3000000000", "job/step/memory.max": "2000000000"}, 2.0),
        ("0::/", {"memory.max": "1500000000"}, 1.5),
        ("5:cpu:/job\n4:memory:/job", {"memory/job/memory.limit_in_bytes": "1000000000"}, 1.0),
        ("4:cpu,memory:/", {"memory/memory.limit_in_bytes": "9223372036854771712"}, MACHINE_GB),
        ("0::/job", {}, MACHINE_GB),
        (None, {}, MACHINE_GB),
    ],
)
def test_the_smallest_limit_holds(tmp_path, groups, limits, usable):
    if groups is not None:
        (tmp_path / "own").write_text(groups + "\n")
    for name, text in limits.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text + "\n")
    assert usable_memory_gb(tmp_path / "own", tmp_path / "root") == pytest.approx(usable)
