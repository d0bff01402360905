"""Model folders: what a model consists of (manifest), and how one is made from an installed package (prepare).

Importing this is light: torch and its like are imported by the conversions alone.
"""

from modelstore.manifest import Manifest, ManifestFile

__all__ = ["Manifest", "ManifestFile"]
