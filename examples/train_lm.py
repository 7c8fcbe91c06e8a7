"""Train a language model on bytes. Installed, it is natten-layers-train-lm; the code is in natten_layers_cli."""

import sys

from natten_layers_cli.launch import train_lm

if __name__ == "__main__":
    sys.exit(train_lm())
