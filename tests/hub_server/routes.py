# SPDX-License-Identifier: Apache-2.0
"""The answer of the server to each path."""

import hashlib
import json
import re
from typing import Any
from urllib.parse import parse_qs

from hub_server.connection import Connection, Reply
from hub_server.store import KINDS, Blob, Refused, Repo, is_large

WHEN = "2026-11-20T12:00:00.000Z"
KIND, ID, REVISION = "(models|datasets|spaces)", r"([\w.-]+/[\w.-]+)", "(refs/[^/]+/[^/]+|[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("DELETE", r"/api/repos/delete", "delete"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", rf"/api/{KIND}/{ID}/preupload/{REVISION}", "preupload"),
    ("POST", rf"/api/{KIND}/{ID}/commit/{REVISION}", "commit"),
    ("GET", rf"/api/{KIND}/{ID}(?:/revision/{REVISION})?", "info"),
    ("GET", rf"/api/{KIND}/{ID}/tree/{REVISION}(?:/(.*))?", "tree"),
    ("POST", rf"/api/{KIND}/{ID}/paths-info/{REVISION}", "paths"),
    ("GET", rf"/api/{KIND}/{ID}/refs", "refs"),
    ("GET", rf"/api/{KIND}/{ID}/commits/{REVISION}", "commits"),
    ("POST", rf"/api/{KIND}/{ID}/branch/{REVISION}", "branch"),
    ("POST", rf"/api/{KIND}/{ID}/tag/{REVISION}", "tag"),
    ("PUT", rf"/api/{KIND}/{ID}/settings", "settings"),
    ("POST", rf"/(?:(datasets|spaces)/)?{ID}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/lfs/(\w{64})(?:/(\d+))?", "put"),
    ("POST", r"/lfs/(\w{64})/complete", "complete"),
    ("GET", rf"/(?:(datasets|spaces)/)?{ID}/resolve/{REVISION}/(.*)", "resolve"),
]  # fmt: skip


class Handler(Connection):
    """The routes; each method receives the matched parts of the path and returns a `Reply` or plain data."""

    routes = ROUTES

    # Accounts and repos.

    def on_whoami(self) -> dict:
        if self.user is None:
            raise Refused(401, "", "Invalid username or password.")
        access = {"displayName": "test", "role": self.user.role}
        return {
            "type": "user", "id": "1", "name": self.user.name, "fullname": self.user.name, "isPro": False,
            "orgs": [{"type": "org", "name": name} for name in self.user.orgs],
            "auth": {"type": "access_token", "accessToken": access},
        }  # fmt: skip

    def on_create(self) -> Any:
        request = self.json()
        repo, is_new = self.hub.store.create(request, self.user)
        url = {"url": self.url(repo.kind, repo.id)}
        return url if is_new else Reply(json.dumps(url).encode(), 409)

    def on_delete(self) -> dict:
        request = self.json()
        namespace = request.get("organization") or (self.user.name if self.user else "")
        kind = KINDS[request.get("type") or "model"]
        repo = self.hub.store.writable(kind, f"{namespace}/{request['name']}", self.user)
        del self.hub.store.repos[repo.kind, repo.id]
        return {}

    def on_settings(self, kind: str, repo_id: str) -> dict:
        wanted = self.json()
        repo = self.hub.store.writable(kind, repo_id, self.user)
        repo.private = bool(wanted.get("private", wanted.get("visibility") == "private"))
        return {"private": repo.private}

    def on_validate(self) -> Any:
        content = self.json()["content"]
        if content.startswith("---") and "\n---" not in content[3:]:
            problem = {"errors": [{"message": "the metadata has no end"}], "warnings": []}
            return Reply(json.dumps(problem).encode(), 400)
        return {"errors": [], "warnings": []}

    def url(self, kind: str, repo_id: str) -> str:
        return f"{self.hub.endpoint}/{'' if kind == 'models' else f'{kind}/'}{repo_id}"

    # Writing.

    def on_preupload(self, kind: str, repo_id: str, revision: str) -> dict:
        files = self.hub.store.writable(kind, repo_id, self.user).at(revision).files
        answers = []
        for file in self.json()["files"]:
            large = is_large(file["path"], file["size"], file.get("sample", "").encode())
            there = files.get(file["path"])
            oid = None if there is None else there.sha256 if there.lfs else there.oid
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def on_batch(self, kind: str | None, repo_id: str) -> dict:
        self.hub.store.writable(kind or "models", repo_id, self.user)
        return {"transfer": "basic", "objects": [self.action(item) for item in self.json()["objects"]]}

    def action(self, item: dict) -> dict:
        """Return the upload address of a large file; the item alone if the file exists."""
        oid, size, step = item["oid"], item["size"], self.hub.part_size
        if oid in self.hub.store.objects:
            return item
        place = f"{self.hub.endpoint}/lfs/{oid}"
        upload: dict[str, Any] = {"href": place, "header": {}}
        if size > step:
            parts = {str(number): f"{place}/{number}" for number in range(1, -(-size // step) + 1)}
            upload = {"href": f"{place}/complete", "header": {"chunk_size": str(step), **parts}}
        return {**item, "actions": {"upload": upload}}

    def on_put(self, oid: str, part: str | None) -> Reply:
        if part is None:
            self.hub.store.put_object(oid, self.body)
        else:
            self.hub.store.parts[oid, int(part)] = self.body
        return Reply(headers={"ETag": f'"{hashlib.sha1(self.body).hexdigest()}"'})

    def on_complete(self, oid: str) -> dict:
        numbers = [part["partNumber"] for part in self.json()["parts"]]
        self.hub.store.put_object(oid, b"".join(self.hub.store.parts[oid, number] for number in numbers))
        return {}

    def on_commit(self, kind: str, repo_id: str, revision: str) -> dict:
        repo = self.hub.store.writable(kind, repo_id, self.user)
        commit = self.hub.store.apply(repo, revision, [json.loads(line) for line in self.body.splitlines()])
        url = f"{self.url(kind, repo_id)}/commit/{commit.oid}"
        return {"success": True, "commitOid": commit.oid, "commitUrl": url}

    def on_branch(self, kind: str, repo_id: str, name: str) -> dict:
        repo = self.hub.store.writable(kind, repo_id, self.user)
        if name in repo.branches:
            raise Refused(409, "", f"Reference already exists: {name}")
        repo.branches[name] = repo.at((self.json() if self.body else {}).get("startingPoint") or "main").oid
        return {}

    def on_tag(self, kind: str, repo_id: str, revision: str) -> dict:
        repo = self.hub.store.writable(kind, repo_id, self.user)
        repo.tags[self.json()["tag"]] = repo.at(revision).oid
        return {}

    # Reading.

    def repo(self, kind: str | None, repo_id: str) -> Repo:
        return self.hub.store.readable(kind or "models", repo_id, self.user)

    def on_info(self, kind: str, repo_id: str, revision: str | None) -> dict:
        repo = self.repo(kind, repo_id)
        commit = repo.at(revision or "main")
        blobs = "blobs" in self.query
        siblings = [
            {"rfilename": path, **(size_and_names(blob, "blobId") if blobs else {})}
            for path, blob in sorted(commit.files.items())
        ]
        return {
            "_id": "1", "id": repo.id, "sha": commit.oid, "author": repo.id.split("/")[0],
            "private": repo.private, "sdk": repo.sdk,
            "gated": False, "disabled": False, "tags": [], "siblings": siblings, "createdAt": WHEN,
            "lastModified": WHEN, "downloads": 0, "likes": 0,
        }  # fmt: skip

    def on_tree(self, kind: str, repo_id: str, revision: str, folder: str | None) -> list[dict]:
        repo = self.repo(kind, repo_id)
        deep = self.query.get("recursive", "").lower() in ("true", "1")
        entries = tree(repo.at(revision).files, f"{folder}/" if folder else "", deep)
        if folder and not entries:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        return entries

    def on_paths(self, kind: str, repo_id: str, revision: str) -> list[dict]:
        files = self.repo(kind, repo_id).at(revision).files
        text = self.body.decode()
        wanted = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
        entries = {entry["path"]: entry for entry in tree(files, "", deep=True)}
        return [entries[path.strip("/")] for path in wanted if path.strip("/") in entries]

    def on_refs(self, kind: str, repo_id: str) -> dict:
        repo = self.repo(kind, repo_id)
        branches, tags = (
            [
                {"name": name, "ref": f"refs/{place}/{name}", "targetCommit": oid}
                for name, oid in names.items()
            ]
            for place, names in (("heads", repo.branches), ("tags", repo.tags))
        )
        return {"branches": branches, "tags": tags, "converts": [], "pullRequests": []}

    def on_commits(self, kind: str, repo_id: str, revision: str) -> list[dict]:
        repo = self.repo(kind, repo_id)
        last = repo.commits.index(repo.at(revision))
        return [
            {"id": commit.oid, "title": commit.summary, "message": "", "date": WHEN, "authors": []}
            for commit in reversed(repo.commits[: last + 1])
        ]

    def on_resolve(self, kind: str | None, repo_id: str, revision: str, path: str) -> Reply:
        repo = self.repo(kind, repo_id)
        commit = repo.at(revision)
        blob = repo.file(revision, path)
        etag = blob.sha256 if blob.lfs else blob.oid
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(blob.data))}
        part = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if part is None:
            return Reply(blob.data, 200, headers)
        size = len(blob.data)
        start = int(part[1]) if part[1] else max(0, size - int(part[2]))
        end = min(int(part[2]) if part[1] and part[2] else size - 1, size - 1)
        if start > end:
            return Reply(b"", 416, {"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        return Reply(blob.data[start : end + 1], 206, headers)


def size_and_names(blob: Blob, name: str) -> dict[str, Any]:
    """Return the size, the hash of git, and the sha256 of a large file."""
    large = {
        "oid": blob.sha256,
        "sha256": blob.sha256,
        "size": len(blob.data),
        "pointerSize": len(blob.pointer),
    }
    return {"size": len(blob.data), name: blob.oid, **({"lfs": large} if blob.lfs else {})}


def tree(files: dict[str, Blob], prefix: str, deep: bool) -> list[dict]:
    """Return the files and folders below `prefix`."""
    entries: dict[str, dict] = {}
    for path, blob in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        for count in range(1, len(parts) if deep else min(len(parts), 2)):
            folder = prefix + "/".join(parts[:count])
            oid = hashlib.sha1(folder.encode()).hexdigest()
            entries.setdefault(folder, {"type": "directory", "path": folder, "oid": oid, "size": 0})
        if deep or len(parts) == 1:
            entries[path] = {"type": "file", "path": path, **size_and_names(blob, "oid")}
    return list(entries.values())
