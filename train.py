"""Train a model: python train.py configs/shakespeare_cpu.toml --train.max_steps=500

The loop is minigpt/training.py; `python train.py --help` lists every setting.
"""

if __name__ == "__main__":
    import signal

    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C during the imports: no traceback
    from minigpt.cli import train

    train()
