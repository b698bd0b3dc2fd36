package cli

// qemuNBDHelp tells of the options of qemu-nbd, all of which are there, in words of its own: programs look for names in it.
const qemuNBDHelp = `Usage: qemu-nbd [OPTIONS] FILE
  or:  qemu-nbd -L [OPTIONS]
Serve a disk image to NBD clients (this is drover under the name of qemu-nbd)

  -h, --help                show this and exit
  -V, --version             show the version and exit

Where clients connect, and how:
  -p, --port=PORT           TCP port (default '10809')
  -b, --bind=IFACE          address to listen on (default '0.0.0.0')
  -k, --socket=PATH         unix socket to listen on instead, an absolute path
                            (with -c: default '/var/lock/qemu-nbd-DEVICE')
  -e, --shared=NUM          clients at a time, 0 for any number (default '1')
  -t, --persistent          stay when the last client has gone
  -v, --verbose             say more; with -c, stay in the foreground
  -x, --export-name=NAME    name of the export (default is the empty name)
  -D, --description=TEXT    description of the export, for people

What they see of the image:
  -o, --offset=OFFSET       begin at a byte of the disk
  -A, --allocation-depth    tell which layer of the chain holds what
  -B, --bitmap=NAME         tell what a dirty bitmap has marked (may be repeated)

General:
  -L, --list                show what another NBD server exports
  --object type,id=ID,...   object for other options: secret, tls-creds-x509,
                            authz-simple, authz-list, authz-listfile
  --tls-creds=ID            encrypt with the credentials of an object
  --tls-hostname=NAME       name in the server's certificate, for -L
  --tls-authz=ID            let in those whom an object names
  -T, --trace [[enable=]<pattern>][,events=<file>][,file=<file>]
                            accepted, without effect
  --fork                    serve in the background; return once it serves
  --pid-file=PATH           write the number of the serving process to a file
  --selinux-label=LABEL     SELinux label of the listening socket

Devices of the kernel:
  -c, --connect=DEV         make FILE available as the NBD device DEV
  -d, --disconnect          end that of the device FILE

How the image is used:
  -f, --format=FORMAT       format of the image (raw, qcow2, ...)
  -r, --read-only           let clients change nothing
  -s, --snapshot            keep changes in a temporary file until the end
  -l, --load-snapshot=SNAPSHOT_PARAM
                            serve a snapshot inside the image, read-only:
                            'snapshot.id=[ID],snapshot.name=[NAME]', or
                            '[ID_OR_NAME]'
  -n, --nocache             bypass the page cache, as --cache=none
      --cache=MODE          'none', 'writeback' (default), 'writethrough',
                            'directsync' or 'unsafe'
      --aio=MODE            native, io_uring or threads: accepted, no effect
      --discard=MODE        what becomes of trim: ignore (default), unmap
      --detect-zeroes=MODE  what becomes of written zeroes: off, on, unmap
      --image-opts          FILE is a list of options, NAME=VALUE,...
`
