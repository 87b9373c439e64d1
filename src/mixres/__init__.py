"""mixres: batch diffusion-transformer samples of different sizes, exactly."""

__version__ = "0.1.0"
