"""klein-mcp: any number of agents, one warm FLUX.2 [klein] engine, a picture back in the same tool call."""

__version__ = "0.1.0"
