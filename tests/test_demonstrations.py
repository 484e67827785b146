"""Every module runs by itself and shows what it is about."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


def test_the_figure_is_drawn(tmp_path):
    command = [sys.executable, ROOT / "docs/figure.py", tmp_path / "figure.png"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    with Image.open(tmp_path / "figure.png") as image:
        assert image.size == (1500, 800) and len(image.convert("L").resize((60, 32)).getcolors()) > 50


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
        ("kernels/triton_contrastive.py", "relative error"),
        ("kernels/triton_slerp.py", "arccos"),
    ],
)
def test_a_module_demonstrates_itself(module, says, tmp_path):
    result = subprocess.run([sys.executable, ROOT / module], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert says in result.stdout and not result.stderr
