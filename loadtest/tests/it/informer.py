"""Follows the clusters of a gateway with the official Python client, for tests/informer.rs.

informer.py KUBECONFIG informer [SELECTOR]  its SharedInformer: list, then watch, with bookmarks
informer.py KUBECONFIG watchlist            its Watch, begun by a stream of the initial events (client-go's WatchList)
informer.py KUBECONFIG probe VERSION...     what a watch from each of these versions meets

What happens is told on stdout, an object of JSON in each line. A line on stdin asks for the cache; the end of stdin ends it.
"""

import json
import sys
import threading
import time
from types import SimpleNamespace

from kubernetes import client, config, watch
from kubernetes.client.exceptions import ApiException
from kubernetes.informer import ADDED, BOOKMARK, DELETED, ERROR, MODIFIED, SharedInformer

GROUP, VERSION, PLURAL = "towline.io", "v1alpha1", "clusters"
# Watches end at an even pace, so that going on from a version is part of what is tested.
WATCH_SECONDS = 3
# While nobody answers.
PAUSE_SECONDS = 0.1

told = threading.Lock()


def tell(**what):
    with told:
        print(json.dumps(what), flush=True)


def version_of(thing):
    return thing["metadata"]["resourceVersion"]


class Source:
    """Lists and watches, and says when which begins."""

    def __init__(self, api):
        self.api = api
        self.phase = "none"
        self.watches = 0

    # The client reads from the annotation what becomes of an event.
    def list_or_watch(self, **arguments) -> object:
        """Lists, or watches if it is asked to."""
        watching = arguments.get("watch", False)
        if watching:
            arguments.update(allow_watch_bookmarks=True, timeout_seconds=WATCH_SECONDS)
        try:
            answer = self.api.list_cluster_custom_object(GROUP, VERSION, PLURAL, **arguments)
        except Exception:
            time.sleep(PAUSE_SECONDS)
            raise
        if watching:
            self.begin("watch", arguments.get("resource_version"))
            return answer
        self.begin("list", version_of(answer))
        version = SimpleNamespace(resource_version=version_of(answer))
        return SimpleNamespace(items=answer["items"], metadata=version)

    def watch_list(self, **arguments) -> object:
        """Watches, from the objects that there are on if no version is given."""
        query = [("watch", "true"), ("allowWatchBookmarks", "true"), ("timeoutSeconds", WATCH_SECONDS)]
        version = arguments.get("resource_version")
        if version is None:
            query += [("sendInitialEvents", "true"), ("resourceVersionMatch", "NotOlderThan")]
        else:
            query.append(("resourceVersion", version))
        asked = self.api.api_client.param_serialize(
            "GET", f"/apis/{GROUP}/{VERSION}/{PLURAL}", query_params=query,
            header_params={"Accept": "application/json"}, auth_settings=["BearerToken"])
        try:
            answer = self.api.api_client.call_api(*asked)
        except Exception:
            time.sleep(PAUSE_SECONDS)
            raise
        if answer.status != 200:
            answer.read()
            raise ApiException.from_response(http_resp=answer, body=None, data=None)
        self.begin("watch" if version else "initial", version)
        return answer.response

    def begin(self, phase, version):
        self.watches += 1
        self.phase = phase
        tell(begins=phase, number=self.watches, version=version)

    def event(self, kind, thing):
        metadata = thing["metadata"]
        tell(event=kind, phase=self.phase, number=self.watches, name=metadata.get("name"),
             uid=metadata.get("uid"), version=metadata["resourceVersion"])


def error_of(error):
    tell(error=getattr(error, "status", None) or type(error).__name__)


def informer(source, selector=None):
    """The cache of the client's own informer."""
    following = SharedInformer(source.list_or_watch, label_selector=selector)
    for kind in (ADDED, MODIFIED, DELETED, BOOKMARK):
        following.add_event_handler(kind, lambda thing, kind=kind: source.event(kind, thing))
    following.add_event_handler(ERROR, error_of)
    following.start()
    return following.cache.list


def watchlist(source):
    """A cache that is filled by a stream of the initial events, whose end a bookmark marks."""
    cache = {}

    def follow():
        version = None
        while True:
            following = watch.Watch()
            try:
                arguments = {} if version is None else {"resource_version": version}
                version = read(following, arguments) or version
            except ApiException as error:
                error_of(error)
                version = None if error.status == 410 else version
            except Exception as error:
                error_of(error)
                version = following.resource_version or version

    def read(following, arguments):
        initial = None if arguments else {}
        # One request: without a time limit of its own the client would go on by itself.
        for event in following.stream(source.watch_list, timeout_seconds=WATCH_SECONDS, **arguments):
            kind, thing = event["type"], event["raw_object"]
            source.event(kind, thing)
            into = cache if initial is None else initial
            if kind == "BOOKMARK":
                marks = thing["metadata"].get("annotations", {})
                if initial is not None and marks.get("k8s.io/initial-events-end") == "true":
                    cache.clear()
                    cache.update(initial)
                    initial = None
                    source.phase = "watch"
                    tell(initial_events_end=version_of(thing), objects=len(cache))
            elif kind == "DELETED":
                into.pop(thing["metadata"]["name"], None)
            else:
                into[thing["metadata"]["name"]] = thing
        return following.resource_version if initial is None else None

    threading.Thread(target=follow, daemon=True).start()
    return lambda: list(cache.values())


def probe(source, versions):
    """What a watch from a version meets, and how soon."""
    for version in versions:
        began = time.monotonic()
        try:
            following = watch.Watch()
            for _ in following.stream(source.list_or_watch, resource_version=version, _request_timeout=10):
                break
            met = "an event"
        except Exception as error:
            met = getattr(error, "status", None) or type(error).__name__
        tell(probed=version, met=met, seconds=time.monotonic() - began)


def main():
    kubeconfig, mode, *words = sys.argv[1:]
    config.load_kube_config(kubeconfig)
    source = Source(client.CustomObjectsApi())
    if mode == "probe":
        return probe(source, words)
    cached = {"informer": informer, "watchlist": watchlist}[mode](source, *words)
    for _ in sys.stdin:
        tell(cache=cached())


main()
