"""Reading and writing of files. These modules import no model: callers pass the classes to build or modules to fill."""
