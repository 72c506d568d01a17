"""The examples of README.md run, in order, as one who copies them would run them."""

import pathlib
import re

import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.mark.skipif(not README.exists(), reason="an installed package has no README.md")
def test_examples_run(capsys):
    examples = BLOCK.findall(README.read_text())
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})
    assert "answered by" in capsys.readouterr().out
