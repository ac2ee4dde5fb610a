"""The embedded cluster and the demo: everything that `make demo` and the cluster tests run as local processes.

binaries.ensure(names=DEFAULT, progress=...) -> dict[str, Path]   blocks; KUBEBUILDER_ASSETS, else built and cached
binaries.kubectl() -> Path
preflight.missing(preflight.gather(root)) -> list[Missing]        what the machine lacks, each with its remedy
processes.run(main()) -> exit code                                SIGINT and SIGTERM cancel main, so every `async with` ends
processes.Supervisor(logs)    async with; .start(Spec) -> Process, .stop(name), .kill(name, SIGKILL), .remove_at_end(paths), [name]
processes.Spec(name, command, env, cwd, ready, ready_timeout_s, stop_deadline_s, restart, restarts_max, backoff_max_s, death_signal)
controlplane.ControlPlane(state_dir, binaries)    async with, or start() and stop(); .admin_kubeconfig, .supervisor,
                                                  .client_kubeconfig(service_account, namespace) -> Path (blocks)
controlplane.api_client(kubeconfig) -> kubernetes ApiClient
install.install_chart(kubeconfig, helm, state_dir, values=None)   async; workloads off, CRDs Established
install.tls_folder(api, secret, folder) -> Path                   async; waits for the operator's issuer
install.create_node(api, name, gpus, labels)                      blocks
install.local_address() -> str                                    what local processes listen on and announce: never loopback
install.announce_agent(api, node, agent_port, node_port, address) and announce_gateway(api, name, port, address)   block
"""
