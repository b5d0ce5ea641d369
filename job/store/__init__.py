"""Everything that crosses the network or must outlive the node: objects, manifests, commits, the Hub.

Enters: local files and small JSON records. Leaves: objects under a store URI, verified copies of
them, and nothing half-written that a reader could mistake for whole. Files:
`objects.py` the store protocol, keys and URIs · `s3.py` (boto3) and `folder.py` implement it ·
`manifest.py` sizes and sha256 of a set of files · `transfer.py` parallel upload and verified
download · `background.py` upload beside the training · `commit.py` order of calls that makes a
checkpoint, a stage record or a release visible · `hub.py` the Hugging Face Hub, read only ·
`server.py` the embedded S3 server.
"""

from job.store.commit import RunStore, latest_release, promote_release, publish_release
from job.store.manifest import Manifest, ManifestEntry
from job.store.objects import Store, open_store

__all__ = [
    "Manifest",
    "ManifestEntry",
    "RunStore",
    "Store",
    "latest_release",
    "open_store",
    "promote_release",
    "publish_release",
]
