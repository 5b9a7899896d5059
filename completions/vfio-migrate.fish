# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_vfio_migrate_global_optspecs
    string join \n v/verbose h/help V/version
end

function __fish_vfio_migrate_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_vfio_migrate_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_vfio_migrate_using_subcommand
    set -l cmd (__fish_vfio_migrate_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c vfio-migrate -n "__fish_vfio_migrate_needs_command" -s v -l verbose -d 'Say more on stderr; twice for everything. RUST_LOG works too'
complete -c vfio-migrate -n "__fish_vfio_migrate_needs_command" -s h -l help -d 'Print help'
complete -c vfio-migrate -n "__fish_vfio_migrate_needs_command" -s V -l version -d 'Print version'
complete -c vfio-migrate -n "__fish_vfio_migrate_needs_command" -f -a "demo" -d 'Show it: a running guest and its PCI devices move live between processes, and the guest checks that nothing was lost'
complete -c vfio-migrate -n "__fish_vfio_migrate_needs_command" -f -a "device" -d 'Serve a sample PCI device over vfio-user'
complete -c vfio-migrate -n "__fish_vfio_migrate_needs_command" -f -a "vm" -d 'Run a guest, or wait for one to arrive'
complete -c vfio-migrate -n "__fish_vfio_migrate_needs_command" -f -a "migrate" -d 'Ask a running `vm` to move to another'
complete -c vfio-migrate -n "__fish_vfio_migrate_needs_command" -f -a "rehearse" -d 'Find out what a migration of a running `vm` would come to, without moving anything'
complete -c vfio-migrate -n "__fish_vfio_migrate_needs_command" -f -a "describe" -d 'Say what a device, a `vm` or this host is, as a manifest that `check` compares'
complete -c vfio-migrate -n "__fish_vfio_migrate_needs_command" -f -a "check" -d 'Ask whether something can move, and get every reason why not'
complete -c vfio-migrate -n "__fish_vfio_migrate_needs_command" -f -a "explain" -d 'Say what a reason\'s code means, and what to do about it'
complete -c vfio-migrate -n "__fish_vfio_migrate_needs_command" -f -a "save" -d 'Save the guest of a running `vm`, or a device alone, into a file'
complete -c vfio-migrate -n "__fish_vfio_migrate_needs_command" -f -a "restore" -d 'Load what `save --device` wrote into a device. For a whole guest: `vm --restore`'
complete -c vfio-migrate -n "__fish_vfio_migrate_needs_command" -f -a "status" -d 'Show a `vm` and its migration, or the VMs of a state directory'
complete -c vfio-migrate -n "__fish_vfio_migrate_needs_command" -f -a "history" -d 'List the migrations, rehearsals, saves and restores that a state directory has seen, without any `vm`'
complete -c vfio-migrate -n "__fish_vfio_migrate_needs_command" -f -a "cancel" -d 'Cancel the migration of a running `vm`: its guest goes on where it is. A receiver (`vm --incoming`, `incoming`) that waits, or has a guest half way, takes none any more until `incoming` lets it wait again; the guest goes on at its source'
complete -c vfio-migrate -n "__fish_vfio_migrate_needs_command" -f -a "continue" -d 'Let a migration go on that waits before its switchover'
complete -c vfio-migrate -n "__fish_vfio_migrate_needs_command" -f -a "set" -d 'Change the limits of a migration while it runs'
complete -c vfio-migrate -n "__fish_vfio_migrate_needs_command" -f -a "stop" -d 'Pause the guest of a running `vm`'
complete -c vfio-migrate -n "__fish_vfio_migrate_needs_command" -f -a "cont" -d 'Let the guest of a running `vm` run: also one that a session left paused, which is started again, or whose owner is not known, which the destination is asked for again'
complete -c vfio-migrate -n "__fish_vfio_migrate_needs_command" -f -a "quit" -d 'End a `vm`; with --force also one whose guest is there, and ends with it'
complete -c vfio-migrate -n "__fish_vfio_migrate_needs_command" -f -a "incoming" -d 'Let a running `vm`, whose guest has left, wait for a guest again'
complete -c vfio-migrate -n "__fish_vfio_migrate_needs_command" -f -a "devices" -d 'List the VFIO devices of this host, and why each can or cannot migrate'
complete -c vfio-migrate -n "__fish_vfio_migrate_needs_command" -f -a "doctor" -d 'Examine this host: what it lacks for migrating VFIO devices, and what fixes it'
complete -c vfio-migrate -n "__fish_vfio_migrate_needs_command" -f -a "tls" -d 'Make certificates for hosts that have none, and say what those that are there are worth'
complete -c vfio-migrate -n "__fish_vfio_migrate_needs_command" -f -a "completions" -d 'Print a shell completion script'
complete -c vfio-migrate -n "__fish_vfio_migrate_needs_command" -f -a "man" -d 'Write the man pages of all verbs into a folder'
complete -c vfio-migrate -n "__fish_vfio_migrate_needs_command" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand demo" -l memory -d 'Guest RAM' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand demo" -l dirty-rate -d 'RAM that the guest dirties each second; 0 for none' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand demo" -l device-state -d 'Internal state of each device, besides its registers' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand demo" -l device-dirty-rate -d 'Internal state that each device changes each second; 0 for none' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand demo" -l devices -d 'Number of devices, up to 64. Each has a server on either side, with memory for its state' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand demo" -l transport -d 'How the two VMs talk' -r -f -a "tcp\t'TCP on loopback'
unix\t'A unix socket'"
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand demo" -l downtime-limit -d 'Longest time the guest may be paused. A ceiling, not a target. 300ms for up to 8 devices, and as much again for each 8 more' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand demo" -l break -d 'Sabotage one thing on purpose, to see that the guest notices' -r -f -a "dirty-log\t'Dirty bits of pages that the guest wrote are dropped from the last report'
device-log\t'The device\'s own dirty log leaves pages out'
device-tail\t'Device bytes are altered late in the stream, framing and digests made to match'
interrupt\t'One interrupt is not connected again at the destination'
page-order\t'A stale copy of a page is applied after its last'
p2p-order\t'A device is stopped before its peer stopped writing to it'"
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand demo" -l no-precopy -d 'Devices that can only be saved while stopped'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand demo" -l software -d 'Use the software guest even where KVM answers'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand demo" -l strict -d 'With --break: leave the engine\'s own check on, where there is one, to see that it notices first'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand demo" -l json -d 'Print one JSON object on stdout'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand demo" -s v -l verbose -d 'Say more on stderr; twice for everything. RUST_LOG works too'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand demo" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand demo" -s V -l version -d 'Print version'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand device" -l socket -d 'Where to listen' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand device" -l state-size -d 'Internal state, besides its registers' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand device" -l state-dirty-rate -d 'Internal state changed each second; 0 for none' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand device" -l dma-interval -d 'Pace of the DMA engine: one descriptor each' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand device" -l model -d 'Model it claims to be' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand device" -l model-version -d 'Version of the model it claims, MAJOR.MINOR.PATCH' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand device" -l param -d 'A parameter of the model that it claims to have. May be given more than once' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand device" -l field -d 'A further field of its manifest, JSON or text: said, and nothing else. May be given more than once' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand device" -l config-byte -d 'A byte of config space that it has otherwise than other sample devices: 0x8=2 is another PCI revision. May be given more than once' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand device" -l fault -d 'Misbehave on purpose; may be given more than once. All are listed below' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand device" -l no-migration -d 'No migration at all'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand device" -l no-precopy -d 'No PRE_COPY: the state can only be saved while the device is stopped'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand device" -l no-p2p -d 'No peer-to-peer states'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand device" -l no-dirty-log -d 'No log of DMA writes'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand device" -l no-extension -d 'Plain vfio-user, without the x-vfio-migrate extension'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand device" -s v -l verbose -d 'Say more on stderr; twice for everything. RUST_LOG works too'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand device" -s h -l help -d 'Print help'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand device" -s V -l version -d 'Print version'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand vm" -l memory -d 'Guest RAM. A guest that arrives or is restored brings its size with it, unless this says another; one that is started has 512M' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand vm" -l device -d 'A device: vfio-user:SOCKET,id=NAME, vfio:0000:01:00.0,id=NAME, vfio:/dev/vfio/devices/vfio0,id=NAME or mdev:UUID,id=NAME. Behind it: slot=N, its slot on the guest\'s PCI bus, 1 to 31 (else the first that is free; to be the same on both sides); pre-copy=off, for a device whose PRE_COPY is broken; timeout=30s, the longest wait for a vfio-user device to change its migration state; vf-token=UUID, for a virtual function that has one (vfio by address). May be given up to 64 times' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand vm" -l incoming -d 'Wait for a guest to arrive at this address instead of starting one: unix:PATH, tcp:HOST:PORT or fd:N, a socket, connected or listening, that this process is started with' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand vm" -l restore -d 'Bring back the guest that `save` wrote into this file, instead of starting one' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand vm" -l control -d 'Control socket: for the user that this process runs as, and root' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand vm" -l control-group -d 'Group, by name or number, whose members may use the control socket too' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand vm" -l control-read-group -d 'Group, by name or number, whose members may ask over the control socket and get its events, and no more: for monitors' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand vm" -l uuid -d 'Identity of the VM. Without it a guest that starts gets a random one, and a guest that arrives keeps its own' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand vm" -l state-dir -d 'Where the ownership journal lives. Without it a lost commit cannot be told from a lost answer after a crash' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand vm" -l dirty-rate -d 'RAM that the guest dirties each second; 0 for none' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand vm" -l policy -d 'File (TOML or JSON) that says what this site allows and asks for, of guests that come and of guests that go' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand vm" -l expect -d 'File (TOML or JSON) that says who may come to a VM that waits, for what, with which VM, from which epoch on, how large and how often. It is read anew for each source that comes; while it is missing or wrong, nobody is taken' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand vm" -l tls-creds -d 'Folder of certificates and keys, with which connections over TCP are secured. Without it none is made or taken' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand vm" -l tls-pin -d 'With --tls-creds: trust peers by this public key, whatever their certificates say, and no CA. As `tls pin` prints it. May be given more than once' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand vm" -l allow-uid -d 'User, by name (qemu) or number (107), whose process may be at the other end of a migration\'s unix socket, as those of this process\'s own user and of root may. May be given more than once' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand vm" -l allow-gid -d 'Group, by name (kvm) or number (36), that a process has which may be at the other end of a migration\'s unix socket. May be given more than once' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand vm" -l config-rule -d 'Bytes of config space to compare or not, over the default and the policy\'s rules: OFFSET+LEN=compare|ignore. `check`, `rehearse` and `migrate` go by them alike. May be given more than once' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand vm" -l once -d 'With --incoming: wait for one migration only, and no longer if it fails or is refused'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand vm" -l paused -d 'Start the guest paused, also one that is restored or that --incoming waits for: `cont` lets it run. Not one that `incoming` waits for later'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand vm" -l software -d 'Use the software guest even where KVM answers'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand vm" -l require-kvm -d 'Refuse to run without KVM, instead of falling back to the software guest'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand vm" -l insecure-plaintext -d 'Let connections over TCP go in plain text: whoever is on the way reads and changes the guest'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand vm" -s v -l verbose -d 'Say more on stderr; twice for everything. RUST_LOG works too'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand vm" -s h -l help -d 'Print help'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand vm" -s V -l version -d 'Print version'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand migrate" -l control -d 'Control socket of the `vm`' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand migrate" -l downtime-limit -d 'Longest time the guest may be paused. A ceiling, not a target' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand migrate" -l bandwidth -d 'Bytes each second at most, while the guest runs. Without it, or with none, there is no cap' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand migrate" -l give-up -d 'Give up when the guest is still running here after this time, not counting the time in which only `continue` is waited for; a rehearsal ends with what it has found' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand migrate" -l map -d 'A device that has another name at the destination. May be given more than once' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand migrate" -l tls-creds -d 'Folder of certificates and keys for this session, instead of that of vm --tls-creds' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand migrate" -l tls-hostname -d 'Name that the destination\'s certificate must have, where it is not the host in its address' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand migrate" -l tls-pin -d 'Trust the destination by this public key, as `tls pin` prints it there. May be given more than once' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand migrate" -l ram-crc -d 'Checksum RAM while the guest runs too, at the price of a copy. Default: on in plain text over TCP, off over TLS, which checks every byte, and over unix sockets' -r -f -a "on\t''
off\t''"
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand migrate" -l json -d 'Print one JSON object on stdout'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand migrate" -l allow-all-dirty -d 'Move even a device that logs no DMA: all of RAM is sent while the guest is paused'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand migrate" -l insecure-plaintext -d 'Let the connection go in plain text: whoever is on the way reads and changes the guest'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand migrate" -l pause-before-switchover -d 'Stop before the switchover and wait for `continue`; the guest keeps running meanwhile'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand migrate" -l suspend -d 'Have the guest arrive paused: `cont` there lets it run. If it does not move, it runs on here'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand migrate" -l verify -d 'Compare digests of all RAM before the guest runs at the destination; the guest is paused meanwhile'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand migrate" -l detach -d 'Return once the migration has begun'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand migrate" -s v -l verbose -d 'Say more on stderr; twice for everything. RUST_LOG works too'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand migrate" -s h -l help -d 'Print help'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand migrate" -s V -l version -d 'Print version'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand rehearse" -l control -d 'Control socket of the `vm`' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand rehearse" -l to -d 'Where to: unix:PATH, tcp:HOST:PORT (an IPv6 address in brackets), fd:N, a connected socket that the `vm` was started with, or fd:NAME, one that was passed to it (getfd)' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand rehearse" -l downtime-limit -d 'Longest time the guest may be paused. A ceiling, not a target' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand rehearse" -l bandwidth -d 'Bytes each second at most, while the guest runs. Without it, or with none, there is no cap' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand rehearse" -l give-up -d 'Give up when the guest is still running here after this time, not counting the time in which only `continue` is waited for; a rehearsal ends with what it has found' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand rehearse" -l map -d 'A device that has another name at the destination. May be given more than once' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand rehearse" -l tls-creds -d 'Folder of certificates and keys for this session, instead of that of vm --tls-creds' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand rehearse" -l tls-hostname -d 'Name that the destination\'s certificate must have, where it is not the host in its address' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand rehearse" -l tls-pin -d 'Trust the destination by this public key, as `tls pin` prints it there. May be given more than once' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand rehearse" -l ram-crc -d 'Checksum RAM while the guest runs too, at the price of a copy. Default: on in plain text over TCP, off over TLS, which checks every byte, and over unix sockets' -r -f -a "on\t''
off\t''"
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand rehearse" -l json -d 'Print one JSON object on stdout'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand rehearse" -l pause -d 'Pause the guest too, for as long as it would be paused, so that all of it is measured'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand rehearse" -l allow-all-dirty -d 'Move even a device that logs no DMA: all of RAM is sent while the guest is paused'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand rehearse" -l insecure-plaintext -d 'Let the connection go in plain text: whoever is on the way reads and changes the guest'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand rehearse" -s v -l verbose -d 'Say more on stderr; twice for everything. RUST_LOG works too'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand rehearse" -s h -l help -d 'Print help'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand rehearse" -s V -l version -d 'Print version'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand describe" -l name -d 'Name to give it' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand describe" -l site -d 'File (TOML) that says what cannot be read: fields of the manifest, by device' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand describe" -l format -d 'How to write it' -r -f -a "manifest\t'The manifest, JSON'
node-labels\t'Kubernetes node labels, JSON'
resource-attributes\t'Attributes of Kubernetes resources, JSON'
list\t'Lines of KEY=VALUE'"
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand describe" -s o -l output -d 'File to write, instead of stdout. It appears whole or not at all. A regular file that is there, or that a symbolic link there leads to, is replaced' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand describe" -l timeout -d 'Longest wait for each answer of a socket that is asked; all of its answers together have five times as long' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand describe" -l host -d 'This host: what it has and can give, with the vfio-user devices that are named'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand describe" -l probe -d 'Open devices of this host that a VFIO driver has and nobody uses, which resets them, and ask them'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand describe" -l json -d 'Print JSON. A manifest is JSON anyway'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand describe" -s v -l verbose -d 'Say more on stderr; twice for everything. RUST_LOG works too'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand describe" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand describe" -s V -l version -d 'Print version'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand check" -l model -d 'With --baseline: of this model alone' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand check" -l policy -d 'File (TOML or JSON) that says what this site allows and asks for' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand check" -l map -d 'A device that has another name at the destination. May be given more than once' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand check" -l tls-creds -d 'Folder of certificates and keys, with which connections over TCP are secured. Without it none is made or taken' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand check" -l tls-pin -d 'With --tls-creds: trust peers by this public key, whatever their certificates say, and no CA. As `tls pin` prints it. May be given more than once' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand check" -l allow-uid -d 'User, by name (qemu) or number (107), whose process may be at the other end of a migration\'s unix socket, as those of this process\'s own user and of root may. May be given more than once' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand check" -l allow-gid -d 'Group, by name (kvm) or number (36), that a process has which may be at the other end of a migration\'s unix socket. May be given more than once' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand check" -l tls-hostname -d 'With --tls-creds: name that the receiver\'s certificate must have, where it is not the host in its address' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand check" -l timeout -d 'Longest wait for each answer of a socket that is asked; all of its answers together have five times as long' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand check" -l matrix -d 'Which devices of which hosts can go to which hosts; where machines are named, which machine to which host, or without a host to which machine. Whatever it says, the exit code is 0'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand check" -l baseline -d 'The newest version of each model, and the values of its parameters, that every host and machine of the pool can load'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand check" -l probe -d 'Open devices of this host that are named, if nobody uses them, which resets them, and ask them'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand check" -l insecure-plaintext -d 'Let connections over TCP go in plain text: whoever is on the way reads and changes the guest'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand check" -l live -d 'Whether it can move live: exit with 3 for what can only be saved and restored, too'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand check" -l json -d 'Print one JSON object on stdout'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand check" -s v -l verbose -d 'Say more on stderr; twice for everything. RUST_LOG works too'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand check" -s h -l help -d 'Print help'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand check" -s V -l version -d 'Print version'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand explain" -l json -d 'Print JSON'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand explain" -s v -l verbose -d 'Say more on stderr; twice for everything. RUST_LOG works too'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand explain" -s h -l help -d 'Print help'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand explain" -s V -l version -d 'Print version'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand save" -l control -d 'Control socket of the `vm` whose guest is saved' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand save" -l device -d 'The device that is saved, without a guest: vfio-user:SOCKET, vfio:0000:01:00.0, vfio:/dev/vfio/devices/vfio0 or mdev:UUID, each with ,id=NAME if it is to have another name than `dev0`, ,pre-copy=off, ,timeout=30s or ,vf-token=UUID as in `vm`' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand save" -s o -l output -d 'File to write. It appears whole or not at all' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand save" -l state-limit -d 'Most bytes of state that each device may give, so that one whose state has no end does not fill the disk. Default: 16 times what the device estimates, and at least 1G; 64G for one that does not estimate it' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand save" -l stop-copy-only -d 'With --device: read all of its state while it is stopped, as if it had no PRE_COPY'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand save" -l force -d 'Replace a regular file that is there, or that a symbolic link there leads to'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand save" -l stop -d 'End the guest here: from then on it lives in the file. Otherwise it goes on'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand save" -l verify -d 'Write a digest of all RAM too, which the restore compares; the guest is paused meanwhile'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand save" -l json -d 'Print one JSON object on stdout'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand save" -s v -l verbose -d 'Say more on stderr; twice for everything. RUST_LOG works too'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand save" -s h -l help -d 'Print help'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand save" -s V -l version -d 'Print version'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand restore" -l device -d 'The device: as for `save --device`. Without an id it takes the name that the file gives it' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand restore" -l save-again -d 'Save it again into this file once it is loaded, before it runs: for a driver that resets its device when it is closed, there is no later' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand restore" -l leave-stopped -d 'Leave it in STOP, as it was loaded, instead of letting it run'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand restore" -l json -d 'Print one JSON object on stdout'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand restore" -s v -l verbose -d 'Say more on stderr; twice for everything. RUST_LOG works too'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand restore" -s h -l help -d 'Print help'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand restore" -s V -l version -d 'Print version'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand status" -l control -d 'Control socket of the `vm`' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand status" -l state-dir -d 'State directory of `vm`s, which need not run: who owns each VM by its journal, and how its last session ended' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand status" -l timeout -d 'Longest wait for each answer of a socket that is asked; all of its answers together have five times as long' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand status" -l watch -d 'Keep showing it until the migration ends'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand status" -l json -d 'Print one JSON object on stdout'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand status" -s v -l verbose -d 'Say more on stderr; twice for everything. RUST_LOG works too'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand status" -s h -l help -d 'Print help'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand status" -s V -l version -d 'Print version'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand history" -l state-dir -d 'State directory of the `vm`s' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand history" -l vm -d 'Only sessions of this VM' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand history" -l last -d 'Only the last N' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand history" -l json -d 'Print one JSON object on stdout'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand history" -s v -l verbose -d 'Say more on stderr; twice for everything. RUST_LOG works too'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand history" -s h -l help -d 'Print help'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand history" -s V -l version -d 'Print version'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand cancel" -l control -d 'Control socket of the `vm`' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand cancel" -l json -d 'Print one JSON object on stdout'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand cancel" -s v -l verbose -d 'Say more on stderr; twice for everything. RUST_LOG works too'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand cancel" -s h -l help -d 'Print help'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand cancel" -s V -l version -d 'Print version'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand continue" -l control -d 'Control socket of the `vm`' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand continue" -l json -d 'Print one JSON object on stdout'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand continue" -s v -l verbose -d 'Say more on stderr; twice for everything. RUST_LOG works too'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand continue" -s h -l help -d 'Print help'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand continue" -s V -l version -d 'Print version'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand set" -l control -d 'Control socket of the `vm`' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand set" -l downtime-limit -d 'New limit on the downtime' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand set" -l bandwidth -d 'New cap on bytes each second; none lifts it' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand set" -l json -d 'Print one JSON object on stdout'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand set" -s v -l verbose -d 'Say more on stderr; twice for everything. RUST_LOG works too'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand set" -s h -l help -d 'Print help'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand set" -s V -l version -d 'Print version'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand stop" -l control -d 'Control socket of the `vm`' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand stop" -l json -d 'Print one JSON object on stdout'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand stop" -s v -l verbose -d 'Say more on stderr; twice for everything. RUST_LOG works too'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand stop" -s h -l help -d 'Print help'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand stop" -s V -l version -d 'Print version'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand cont" -l control -d 'Control socket of the `vm`' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand cont" -l json -d 'Print one JSON object on stdout'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand cont" -s v -l verbose -d 'Say more on stderr; twice for everything. RUST_LOG works too'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand cont" -s h -l help -d 'Print help'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand cont" -s V -l version -d 'Print version'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand quit" -l control -d 'Control socket of the `vm`' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand quit" -l json -d 'Print one JSON object on stdout'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand quit" -l force -d 'End a guest that is here with it. Without this, a `vm` whose guest is here, running or paused, does not quit'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand quit" -s v -l verbose -d 'Say more on stderr; twice for everything. RUST_LOG works too'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand quit" -s h -l help -d 'Print help'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand quit" -s V -l version -d 'Print version'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand incoming" -l control -d 'Control socket of the `vm`' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand incoming" -l tls-creds -d 'Folder of certificates and keys for this wait, instead of that of vm --tls-creds' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand incoming" -l tls-pin -d 'Trust sources by this public key, as `tls pin` prints it there, instead of those of vm --tls-pin. May be given more than once' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand incoming" -l expect -d 'File (TOML or JSON) that says who may come and with what, instead of that of vm --expect; it is read anew for each source that comes' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand incoming" -l json -d 'Print one JSON object on stdout'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand incoming" -l insecure-plaintext -d 'Let what comes over TCP come in plain text: whoever is on the way reads and changes the guest'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand incoming" -l once -d 'Wait for one migration only, and no longer if it fails or is refused, as with vm --once'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand incoming" -l paused -d 'Have the guest arrive paused: `cont` lets it run'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand incoming" -s v -l verbose -d 'Say more on stderr; twice for everything. RUST_LOG works too'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand incoming" -s h -l help -d 'Print help'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand incoming" -s V -l version -d 'Print version'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand devices" -l timeout -d 'Longest wait for each answer of a socket that is asked; all of its answers together have five times as long' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand devices" -l probe -d 'Open each listed device that a VFIO driver has and nobody uses, ask it, and close it. Opening a device resets it; one that is in use is left alone'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand devices" -l all -d 'Every PCI function, also one that has nothing to do with VFIO'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand devices" -l json -d 'Print one JSON object on stdout'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand devices" -s v -l verbose -d 'Say more on stderr; twice for everything. RUST_LOG works too'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand devices" -s h -l help -d 'Print help'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand devices" -s V -l version -d 'Print version'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand doctor" -l memory -d 'RAM of the guest that is meant: the limit on locked memory must have room for it' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand doctor" -l tls-creds -d 'Folder of certificates that is meant, as `vm` takes it: whether they can be used, and until when' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand doctor" -l tls-pin -d 'With --tls-creds: the keys that are trusted and no CA, as `vm` takes them. May be given more than once' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand doctor" -l json -d 'Print one JSON object on stdout'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand doctor" -s v -l verbose -d 'Say more on stderr; twice for everything. RUST_LOG works too'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand doctor" -s h -l help -d 'Print help'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand doctor" -s V -l version -d 'Print version'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and not __fish_seen_subcommand_from init host revoke show pin" -s v -l verbose -d 'Say more on stderr; twice for everything. RUST_LOG works too'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and not __fish_seen_subcommand_from init host revoke show pin" -s h -l help -d 'Print help'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and not __fish_seen_subcommand_from init host revoke show pin" -s V -l version -d 'Print version'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and not __fish_seen_subcommand_from init host revoke show pin" -f -a "init" -d 'Make a private CA: ca-cert.pem, and ca-key.pem, which is not to leave its host'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and not __fish_seen_subcommand_from init host revoke show pin" -f -a "host" -d 'Make the certificates and keys of a host, by a CA that `tls init` made'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and not __fish_seen_subcommand_from init host revoke show pin" -f -a "revoke" -d 'Take the certificates of a host back: no host that has the ca-crl.pem that this writes beside its ca-cert.pem takes them any more'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and not __fish_seen_subcommand_from init host revoke show pin" -f -a "show" -d 'Say what certificates a folder has, for whom, until when, and whether they can be used'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and not __fish_seen_subcommand_from init host revoke show pin" -f -a "pin" -d 'Print the pins of a folder\'s keys, for --tls-pin at the other host'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and __fish_seen_subcommand_from init" -l days -d 'Days for which the CA\'s certificate is valid' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and __fish_seen_subcommand_from init" -l json -d 'Print what was made as JSON'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and __fish_seen_subcommand_from init" -s v -l verbose -d 'Say more on stderr; twice for everything. RUST_LOG works too'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and __fish_seen_subcommand_from init" -s h -l help -d 'Print help'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and __fish_seen_subcommand_from init" -s V -l version -d 'Print version'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and __fish_seen_subcommand_from host" -l ca -d 'Folder of the CA' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and __fish_seen_subcommand_from host" -s o -l output -d 'Folder to write into: it is what --tls-creds takes. Without it: NAME' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and __fish_seen_subcommand_from host" -l also -d 'A further name or address of the host. May be given more than once' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and __fish_seen_subcommand_from host" -l days -d 'Days for which the certificates are valid, if their CA is' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and __fish_seen_subcommand_from host" -l force -d 'Replace the files that are there: a `vm` that waits takes the new ones for its next connection'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and __fish_seen_subcommand_from host" -l json -d 'Print what was made as JSON'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and __fish_seen_subcommand_from host" -s v -l verbose -d 'Say more on stderr; twice for everything. RUST_LOG works too'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and __fish_seen_subcommand_from host" -s h -l help -d 'Print help'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and __fish_seen_subcommand_from host" -s V -l version -d 'Print version'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and __fish_seen_subcommand_from revoke" -l cert -d 'A file of certificates of this CA. May be given more than once' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and __fish_seen_subcommand_from revoke" -l ca -d 'Folder of the CA. What was revoked before stays so' -r -F
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and __fish_seen_subcommand_from revoke" -l days -d 'Days after which the list counts no more, and with it no certificate of the CA where it lies: renew it before' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and __fish_seen_subcommand_from revoke" -l json -d 'Print what was made as JSON'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and __fish_seen_subcommand_from revoke" -s v -l verbose -d 'Say more on stderr; twice for everything. RUST_LOG works too'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and __fish_seen_subcommand_from revoke" -s h -l help -d 'Print help'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and __fish_seen_subcommand_from revoke" -s V -l version -d 'Print version'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and __fish_seen_subcommand_from show" -l tls-pin -d 'A key that peers are trusted by, as at `vm`: with one, no CA is needed. May be given more than once' -r
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and __fish_seen_subcommand_from show" -l json -d 'Print it as JSON'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and __fish_seen_subcommand_from show" -s v -l verbose -d 'Say more on stderr; twice for everything. RUST_LOG works too'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and __fish_seen_subcommand_from show" -s h -l help -d 'Print help'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and __fish_seen_subcommand_from show" -s V -l version -d 'Print version'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and __fish_seen_subcommand_from pin" -l json -d 'Print them as JSON'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and __fish_seen_subcommand_from pin" -s v -l verbose -d 'Say more on stderr; twice for everything. RUST_LOG works too'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and __fish_seen_subcommand_from pin" -s h -l help -d 'Print help'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand tls; and __fish_seen_subcommand_from pin" -s V -l version -d 'Print version'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand completions" -s v -l verbose -d 'Say more on stderr; twice for everything. RUST_LOG works too'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand completions" -s h -l help -d 'Print help'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand completions" -s V -l version -d 'Print version'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand man" -s v -l verbose -d 'Say more on stderr; twice for everything. RUST_LOG works too'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand man" -s h -l help -d 'Print help'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand man" -s V -l version -d 'Print version'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand help; and not __fish_seen_subcommand_from demo device vm migrate rehearse describe check explain save restore status history cancel continue set stop cont quit incoming devices doctor tls completions man help" -f -a "demo" -d 'Show it: a running guest and its PCI devices move live between processes, and the guest checks that nothing was lost'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand help; and not __fish_seen_subcommand_from demo device vm migrate rehearse describe check explain save restore status history cancel continue set stop cont quit incoming devices doctor tls completions man help" -f -a "device" -d 'Serve a sample PCI device over vfio-user'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand help; and not __fish_seen_subcommand_from demo device vm migrate rehearse describe check explain save restore status history cancel continue set stop cont quit incoming devices doctor tls completions man help" -f -a "vm" -d 'Run a guest, or wait for one to arrive'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand help; and not __fish_seen_subcommand_from demo device vm migrate rehearse describe check explain save restore status history cancel continue set stop cont quit incoming devices doctor tls completions man help" -f -a "migrate" -d 'Ask a running `vm` to move to another'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand help; and not __fish_seen_subcommand_from demo device vm migrate rehearse describe check explain save restore status history cancel continue set stop cont quit incoming devices doctor tls completions man help" -f -a "rehearse" -d 'Find out what a migration of a running `vm` would come to, without moving anything'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand help; and not __fish_seen_subcommand_from demo device vm migrate rehearse describe check explain save restore status history cancel continue set stop cont quit incoming devices doctor tls completions man help" -f -a "describe" -d 'Say what a device, a `vm` or this host is, as a manifest that `check` compares'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand help; and not __fish_seen_subcommand_from demo device vm migrate rehearse describe check explain save restore status history cancel continue set stop cont quit incoming devices doctor tls completions man help" -f -a "check" -d 'Ask whether something can move, and get every reason why not'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand help; and not __fish_seen_subcommand_from demo device vm migrate rehearse describe check explain save restore status history cancel continue set stop cont quit incoming devices doctor tls completions man help" -f -a "explain" -d 'Say what a reason\'s code means, and what to do about it'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand help; and not __fish_seen_subcommand_from demo device vm migrate rehearse describe check explain save restore status history cancel continue set stop cont quit incoming devices doctor tls completions man help" -f -a "save" -d 'Save the guest of a running `vm`, or a device alone, into a file'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand help; and not __fish_seen_subcommand_from demo device vm migrate rehearse describe check explain save restore status history cancel continue set stop cont quit incoming devices doctor tls completions man help" -f -a "restore" -d 'Load what `save --device` wrote into a device. For a whole guest: `vm --restore`'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand help; and not __fish_seen_subcommand_from demo device vm migrate rehearse describe check explain save restore status history cancel continue set stop cont quit incoming devices doctor tls completions man help" -f -a "status" -d 'Show a `vm` and its migration, or the VMs of a state directory'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand help; and not __fish_seen_subcommand_from demo device vm migrate rehearse describe check explain save restore status history cancel continue set stop cont quit incoming devices doctor tls completions man help" -f -a "history" -d 'List the migrations, rehearsals, saves and restores that a state directory has seen, without any `vm`'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand help; and not __fish_seen_subcommand_from demo device vm migrate rehearse describe check explain save restore status history cancel continue set stop cont quit incoming devices doctor tls completions man help" -f -a "cancel" -d 'Cancel the migration of a running `vm`: its guest goes on where it is. A receiver (`vm --incoming`, `incoming`) that waits, or has a guest half way, takes none any more until `incoming` lets it wait again; the guest goes on at its source'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand help; and not __fish_seen_subcommand_from demo device vm migrate rehearse describe check explain save restore status history cancel continue set stop cont quit incoming devices doctor tls completions man help" -f -a "continue" -d 'Let a migration go on that waits before its switchover'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand help; and not __fish_seen_subcommand_from demo device vm migrate rehearse describe check explain save restore status history cancel continue set stop cont quit incoming devices doctor tls completions man help" -f -a "set" -d 'Change the limits of a migration while it runs'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand help; and not __fish_seen_subcommand_from demo device vm migrate rehearse describe check explain save restore status history cancel continue set stop cont quit incoming devices doctor tls completions man help" -f -a "stop" -d 'Pause the guest of a running `vm`'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand help; and not __fish_seen_subcommand_from demo device vm migrate rehearse describe check explain save restore status history cancel continue set stop cont quit incoming devices doctor tls completions man help" -f -a "cont" -d 'Let the guest of a running `vm` run: also one that a session left paused, which is started again, or whose owner is not known, which the destination is asked for again'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand help; and not __fish_seen_subcommand_from demo device vm migrate rehearse describe check explain save restore status history cancel continue set stop cont quit incoming devices doctor tls completions man help" -f -a "quit" -d 'End a `vm`; with --force also one whose guest is there, and ends with it'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand help; and not __fish_seen_subcommand_from demo device vm migrate rehearse describe check explain save restore status history cancel continue set stop cont quit incoming devices doctor tls completions man help" -f -a "incoming" -d 'Let a running `vm`, whose guest has left, wait for a guest again'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand help; and not __fish_seen_subcommand_from demo device vm migrate rehearse describe check explain save restore status history cancel continue set stop cont quit incoming devices doctor tls completions man help" -f -a "devices" -d 'List the VFIO devices of this host, and why each can or cannot migrate'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand help; and not __fish_seen_subcommand_from demo device vm migrate rehearse describe check explain save restore status history cancel continue set stop cont quit incoming devices doctor tls completions man help" -f -a "doctor" -d 'Examine this host: what it lacks for migrating VFIO devices, and what fixes it'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand help; and not __fish_seen_subcommand_from demo device vm migrate rehearse describe check explain save restore status history cancel continue set stop cont quit incoming devices doctor tls completions man help" -f -a "tls" -d 'Make certificates for hosts that have none, and say what those that are there are worth'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand help; and not __fish_seen_subcommand_from demo device vm migrate rehearse describe check explain save restore status history cancel continue set stop cont quit incoming devices doctor tls completions man help" -f -a "completions" -d 'Print a shell completion script'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand help; and not __fish_seen_subcommand_from demo device vm migrate rehearse describe check explain save restore status history cancel continue set stop cont quit incoming devices doctor tls completions man help" -f -a "man" -d 'Write the man pages of all verbs into a folder'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand help; and not __fish_seen_subcommand_from demo device vm migrate rehearse describe check explain save restore status history cancel continue set stop cont quit incoming devices doctor tls completions man help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand help; and __fish_seen_subcommand_from tls" -f -a "init" -d 'Make a private CA: ca-cert.pem, and ca-key.pem, which is not to leave its host'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand help; and __fish_seen_subcommand_from tls" -f -a "host" -d 'Make the certificates and keys of a host, by a CA that `tls init` made'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand help; and __fish_seen_subcommand_from tls" -f -a "revoke" -d 'Take the certificates of a host back: no host that has the ca-crl.pem that this writes beside its ca-cert.pem takes them any more'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand help; and __fish_seen_subcommand_from tls" -f -a "show" -d 'Say what certificates a folder has, for whom, until when, and whether they can be used'
complete -c vfio-migrate -n "__fish_vfio_migrate_using_subcommand help; and __fish_seen_subcommand_from tls" -f -a "pin" -d 'Print the pins of a folder\'s keys, for --tls-pin at the other host'
