"""Sample text: python sample.py runs/shakespeare_cpu --prompt "..." --top-p 0.9

Decoding is minigpt/engine.py and minigpt/sampling.py; `python sample.py --help` lists every flag.
"""

from minigpt.cli import sample

if __name__ == "__main__":
    sample()
