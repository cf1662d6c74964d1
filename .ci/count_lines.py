"""Fails if a part of a package has too many lines of code; blank lines, comments and docstrings do not count.

Usage: python .ci/count_lines.py FOLDER PART=MOST ..., where PART is a key of PARTS or ground.
"""

import ast
import sys
import tokenize
from collections import Counter
from pathlib import Path

PARTS = {
    "layer": "recipe ending presets settings loading data_files manifest tracking trl_patches dataset_adapters "
    "preflight shared_prefix ppo health runs rounds playground",
    "commands": "__main__ cli flags catalog launch models sample evaluate compare vote publish pages",
    "doctor": "doctor",
}
"""Rooms by part: `layer` is imported by recipes, `commands` are the verbs. A room that is not listed is `ground`."""
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(file: Path) -> int:
    """The number of lines that hold code."""
    with tokenize.open(file) as source:
        tokens = list(tokenize.generate_tokens(source.readline))
    lines = {line for token in tokens if token.type not in NO_CODE for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(file.read_bytes())):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


folder, limits = Path(sys.argv[1]), dict(word.split("=") for word in sys.argv[2:])
part_of = {room: part for part, rooms in PARTS.items() for room in rooms.split()}
count: Counter[str] = Counter()
for file in folder.rglob("*.py"):
    room = file.relative_to(folder).parts[0].removesuffix(".py")
    count[part_of.get(room, "ground")] += code_lines(file)
sys.stdout.write("".join(f"{part}: {count[part]} lines of code, at most {most}\n" for part, most in limits.items()))
if over := [part for part, most in limits.items() if count[part] > int(most)]:
    sys.exit(f"Too many lines of code in {folder}: {', '.join(over)}. The layer is thin: make it thinner elsewhere.")
