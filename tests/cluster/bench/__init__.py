"""A real Kubernetes control plane on one machine, without containers, for tests.

    conftest.bench -> bench.Bench   what a test holds: nodes, namespaces, kubeconfigs, faults
                        | a socket that stays open
                      serve         the supervisor: ends with the process that holds the socket
                        | starts
                      controlplane  etcd, API server, controller manager, scheduler (of programs' binary)
                      kubelet       registers the nodes and runs each pod's command as a local process

What is real: the API with its checks, admission, RBAC and garbage collection, Jobs, quotas, priorities, the
scheduling onto nodes with eight GPUs, node loss. What is not: there are no images, no network, no limits and
no isolation; a pod's processes run as the user who runs the tests, in the tests' own Python. A volume is a
folder, and since there is no mount namespace, arguments and variables that begin with a mount path are
rewritten to begin with the folder (``kubelet.volumes``).
"""
