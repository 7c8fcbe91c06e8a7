"""Train an HDiT. Installed, it is natten-layers-train-hdit; the code is in natten_layers_cli."""

import sys

from natten_layers_cli.launch import train_hdit

if __name__ == "__main__":
    sys.exit(train_hdit())
