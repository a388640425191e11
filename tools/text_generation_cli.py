"""Talk to a text generation server from a terminal: a prompt, how many tokens, what the model writes, again and again.

    python tools/text_generation_cli.py localhost:5000

An address of the whole route (http://host:port/api) works too. An empty prompt, end-of-file or Ctrl-C ends it. Lines
can be edited, and earlier ones recalled, where Python has readline.
"""

import argparse
import contextlib
import json
import sys
import urllib.error
import urllib.request

with contextlib.suppress(ImportError):
    import readline  # noqa: F401  (input() edits lines with it)


def api_url(address: str) -> str:
    """HOST:PORT, or an address that has all."""
    url = address if "://" in address else f"http://{address}"
    return url if url.rstrip("/").endswith("/api") else f"{url.rstrip('/')}/api"


def ask(url: str, prompt: str, num_tokens: int, key: str | None = None) -> str:
    """What to show: the text, or why there is none."""
    body = json.dumps({"prompts": [prompt], "tokens_to_generate": num_tokens}).encode()
    headers = {"Content-Type": "application/json; charset=UTF-8"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, body, headers, method="PUT")
    try:
        with urllib.request.urlopen(request) as answer:
            status, found = answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        status, found = error.code, _read_error(error)
    except OSError as error:
        return f"Error: {url} cannot be reached: {getattr(error, 'reason', error)}"
    if isinstance(found, dict) and "text" in found:
        return f"Megatron Response: \n{found['text'][0]}"
    if isinstance(found, dict):
        found = found.get("message", found)
    return f"Error {status}: {found}"


def _read_error(error: urllib.error.HTTPError) -> object:
    text = error.read().decode(errors="replace")
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_number(words: str) -> int | None:
    """A whole number from the terminal; asks again until it gets one. None at the end."""
    while True:
        line = input(words).strip()
        if not line:
            return None
        if line.isdecimal():
            return int(line)
        print(f"{line!r} is not a whole number")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", metavar="HOST:PORT", help="where tools/run_text_generation_server.py listens")
    parser.add_argument("--api-key", help="key that the server asks for")
    args = parser.parse_args()
    url = api_url(args.address)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while prompt := input("Enter prompt: "):
            number = read_number("Enter number of tokens to generate: ")
            if number is None:
                break
            print(ask(url, prompt, number, args.api_key))
        return 0
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
