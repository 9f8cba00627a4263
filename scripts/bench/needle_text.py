"""A long text with numbers hidden in it, as a file for `longrun.chat --file`, and questions for `--ask`.

    python scripts/bench/needle_text.py --model DIR --length 3.3M --needles 5 --out FOLDER

FOLDER gets text.txt, questions.txt (one a line) and numbers.json (what each answer must begin with). Depths are spread
evenly from the start to the end. For models without a chat template, like planted ones: a question ends where the
answer begins.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from longrun.arguments import SEED, whole
from longrun.cli import Parser, run
from longrun.errors import InputError
from longrun.files.whole_file import write_whole
from longrun.model.tokenizer import load_tokenizer
from longrun.needles.needles import Haystack, build_prompt, make_needles
from longrun.paths import path_option
from longrun.units import TOKENS


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files and print the text's length. Status 0."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=path_option, required=True, metavar="DIR")
    parser.add_argument("--length", type=TOKENS, required=True, metavar="N", help="tokens of text and longest question")
    parser.add_argument("--needles", type=whole(2), default=5, metavar="N")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--out", type=path_option, required=True, metavar="FOLDER")
    args = parser.parse_args(argv)
    tokenizer = load_tokenizer(args.model)
    depths = [i / (args.needles - 1) for i in range(args.needles)]
    needles = make_needles(args.needles, args.seed)
    prompt = build_prompt(tokenizer, Haystack.generated(args.seed), needles, args.length, depths)
    questions = [" ".join(tokenizer.decode(list(asked.token_ids)).split()) for asked in prompt.questions]
    files = {
        "text.txt": tokenizer.decode(prompt.document_ids),
        "questions.txt": "\n".join(questions) + "\n",
        "numbers.json": json.dumps([asked.needle.key for asked in prompt.questions]) + "\n",
    }
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder {args.out} cannot be made ({error.strerror}): give another --out") from error
    for name, text in files.items():
        write_whole(args.out / name, text.encode())
    print(f"{len(prompt.document_ids):,} tokens in {args.out / 'text.txt'}")
    return 0


if __name__ == "__main__":
    run(main)
