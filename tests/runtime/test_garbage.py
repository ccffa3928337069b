"""The garbage collector neither runs during imports, nor looks at what they left afterwards."""

import subprocess
import sys

PROGRAM = """
import gc
from app.runtime.garbage import collections_paused
with collections_paused():
    print(gc.isenabled())
    imported = [[] for _ in range(10_000)]
print(gc.isenabled(), gc.get_freeze_count() > len(imported), len(gc.get_objects()) < len(imported))
gc.disable()
with collections_paused():
    pass
print(gc.isenabled())
"""


def test_imported_objects_are_never_collected():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True", "True", "False"]
