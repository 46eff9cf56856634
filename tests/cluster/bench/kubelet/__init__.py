"""A kubelet that runs pods as local processes: ``python -m tests.cluster.bench.kubelet``.

__main__     reads ``nodes/*.json`` of the bench's folder: which nodes there are, which are cut off
node         one node: registered, kept alive, its pods watched
pod          one pod's life: pulled, started, restarted, stopped, its status told
container    one container's process; environment, volumes and logfile are what it sees and says
server       the kubelet's HTTPS API: logs, and exec (websocket)
"""
