"""Sample text: python sample.py runs/shakespeare_cpu --prompt "..." --top-p 0.9

Decoding is minigpt/engine.py and minigpt/sampling.py; `python sample.py --help` lists every flag.
"""

if __name__ == "__main__":
    import signal

    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C during the imports: no traceback
    from minigpt.cli import sample

    sample()
