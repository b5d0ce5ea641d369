"""Everything that crosses the network or must outlive the node: objects, manifests, commits, the Hub.

Enters: local files and small JSON records. Leaves: objects under a store URI, verified copies of
them, and nothing half-written that a reader could mistake for whole. Files:
`objects.py` the store protocol, keys and URIs · `s3.py` (boto3) and `folder.py` implement it ·
`manifest.py` sizes and sha256 of a set of files, `held.py` one that may lie in memory · `transfer.py` parallel upload
and verified download, `parallel.py` threads · `background.py` upload beside the training · `hub.py` the
Hugging Face Hub, read only · `server.py` the embedded S3 server.
The commit protocol, whose order of calls stands in `commit.py` (fence and pointer): `probe.py` can
the store do it · `lease.py` who owns a run · `attempt.py` an attempt from its lease to its end ·
`ledger.py` what every attempt came to · `checkpoints.py` writes, `restore.py` reads, `retention.py`
deletes checkpoints · `release.py` the same for releases · `promotion.py` which of them is current,
`pruning.py` deletes old ones · `records.py` small JSON objects · `runs.py` one run's prefix ·
`cached.py` a cache for all nodes · `inventory.py` what lies there, for `job show`.
"""

from job.store.attempt import Attempt
from job.store.cached import SharedFolders
from job.store.manifest import Manifest, ManifestEntry
from job.store.objects import Store, open_store
from job.store.promotion import ModelPointer
from job.store.pruning import Pruner
from job.store.release import latest_release, publish_release
from job.store.runs import RunStore

__all__ = [
    "Attempt", "Manifest", "ManifestEntry", "ModelPointer", "Pruner", "RunStore", "SharedFolders", "Store",
    "latest_release", "open_store", "publish_release",
]  # fmt: skip
