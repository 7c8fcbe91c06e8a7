"""Sample images from an HDiT. Installed, it is natten-layers-sample-hdit; the code is in natten_layers_cli."""

import sys

from natten_layers_cli.launch import sample_hdit

if __name__ == "__main__":
    sys.exit(sample_hdit())
