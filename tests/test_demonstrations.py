"""Every module runs by itself and shows what it is about."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("model.py", "149,620,737 parameters"),
        ("tokenizer.py", "merges learned"),
        ("lora.py", "983,040 trainable parameters"),
        ("fusion.py", "untrained, the unit embedding moves by 0.0e+00"),
        ("prompts.py", "vocal fold polyp"),
        ("data.py", "mirrored"),
        ("metrics.py", "macro-F1"),
        ("phantom.py", "right ear"),
        ("kernels/reference.py", "slerp"),
    ],
)
def test_a_module_demonstrates_itself(module, says, tmp_path):
    result = subprocess.run([sys.executable, ROOT / module], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert says in result.stdout and not result.stderr
