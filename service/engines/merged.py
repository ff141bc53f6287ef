"""Merged weights on disk for an engine that loads a folder, and the model that distils beside it."""

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from service.engines.packed import PackedModel, PackedSource
from service.engines.protocol import BundlePlace


@dataclass(frozen=True)
class MergedSource:
    """A worker's model that on its way saves its merged weights once.

    The worker that distils has merged them anyway: nothing is loaded twice, and nothing large in the server's process.
    """

    packed: PackedSource
    weights: Path

    def open(self, *, gently: bool = False) -> PackedModel:
        """Load the model and see to it that its weights stand in `weights`.

        Raises:
            BundleError, BackboneError, TokenizerError: the bundle cannot be served.
            OSError: the weights cannot be written.
        """
        model = self.packed.open(gently=gently)
        if not self.weights.is_dir():
            self._save(model)
        return model

    def with_place(self, place: BundlePlace) -> "MergedSource":
        """Return the source with one bundle more."""
        return replace(self, packed=self.packed.with_place(place))

    def without(self, bundle_id: str) -> "MergedSource":
        """Return the source with one bundle less."""
        return replace(self, packed=self.packed.without(bundle_id))

    def _save(self, model: PackedModel) -> None:
        """Write to a scratch folder beside, then rename: a folder that is there is whole."""
        self.weights.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{self.weights.name}.", dir=self.weights.parent))
        try:
            model.save_weights(scratch)
            scratch.rename(self.weights)
        except OSError:
            if not self.weights.is_dir():  # else another server was faster, and its folder is as good
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
