"""The walk-through in docs/add-a-mixer.md, followed to the letter in a copy of the project."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_page_works_as_printed(tmp_path):
    page = (ROOT / "docs" / "add-a-mixer.md").read_text()
    named = re.findall(r"`(hippodrome/mixers/\w+\.py|tests/mixers/\w+\.py)`\n.*?```python\n(.*?)```", page, flags=re.DOTALL)
    assert [Path(name).name for name, _ in named] == ["gated_average.py", "test_gated_average.py"]

    skip = shutil.ignore_patterns("assets", "golden", "__pycache__")
    shutil.copytree(ROOT / "hippodrome", tmp_path / "hippodrome", ignore=skip)
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, code in named:
        (tmp_path / name).write_text(code)

    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/mixers/test_gated_average.py"]
    command += ["tests/contracts/test_mixers.py", "-k", "gated_average"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    passed = int(re.search(r"(\d+) passed", result.stdout)[1])
    assert passed > 10, result.stdout
