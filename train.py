"""Train a model: python train.py configs/shakespeare_cpu.toml --train.max_steps=500

The loop is minigpt/training.py; `python train.py --help` lists every setting.
"""

from minigpt.cli import train

if __name__ == "__main__":
    train()
