package scripts

// disk makes disk.qcow2, 16 MiB with data and holes, and a snapshot.
const disk = `
qemu-img create -q -f qcow2 disk.qcow2 16M
qemu-io -c 'write -q -P 7 1M 3M' -c 'write -q -z 3M 512k' -c 'write -q -P 9 9000k 70k' disk.qcow2
`

// prelude comes before every script: `! command` does not end one when it is wrong.
const prelude = `
fails() { if "$@"; then echo "should have failed: $*"; exit 1; fi; }
`

var scripts = []script{
	{
		name: "cloud-localds", needs: []string{"cloud-localds", "genisoimage", "isoinfo"}, calls: []string{"qemu-img"}, dates: true,
		text: `
printf '#cloud-config\nhostname: drove\n' >user; echo 'instance-id: i-1' >meta; echo 'version: 2' >net
cloud-localds -d raw seed.raw user meta
cloud-localds -d qcow2 -m local -H drove -N net seed.qcow2 user
qemu-img convert -f qcow2 -O raw seed.qcow2 back.raw
for image in seed.raw back.raw; do
  isoinfo -R -f -i $image
  isoinfo -R -x /user-data -i $image; isoinfo -R -x /meta-data -i $image
done
isoinfo -R -x /network-config -i back.raw
fails cloud-localds -d nosuch seed.nosuch user
`,
	},
	{
		name: "genimage", needs: []string{"genimage"}, calls: []string{"qemu-img"},
		text: `
mkdir root in; head -c 300000 /dev/zero | tr '\0' a >in/a.bin; seq 100000 >in/b.bin
cat >config <<'END'
image disk.qcow2 {
	qemu { format = "qcow2" }
	partition one { image = "a.bin" }
	partition two { image = "b.bin" }
}
image disk.raw {
	qemu { format = "raw" }
	partition two { image = "b.bin" }
}
image small.qcow2 {
	qemu {
		format = "qcow2"
		extraargs = "-c -o cluster_size=4k"
	}
	partition two { image = "b.bin" }
}
END
genimage --config config --inputpath in --rootpath root --tmppath tmp --outputpath .
`,
	},
	{
		// A list of words in brackets is a server that the program starts itself, and hands a socket to as systemd does.
		name: "nbdcopy", needs: []string{"nbdcopy"}, calls: []string{"qemu-nbd"},
		text: disk + `
nbdcopy -- [ qemu-nbd -r -f qcow2 disk.qcow2 ] null:
nbdcopy -- [ qemu-nbd -f qcow2 disk.qcow2 ] out.raw
fails nbdcopy -- out.raw [ qemu-nbd -f raw copy.raw ] 2>/dev/null
qemu-img create -q -f raw copy.raw 16M
qemu-img create -q -f qcow2 copy.qcow2 16M
nbdcopy --flush -- out.raw [ qemu-nbd -f raw copy.raw ]
nbdcopy --flush --destination-is-zero -- [ qemu-nbd -r -f qcow2 disk.qcow2 ] [ qemu-nbd -f qcow2 --discard=unmap copy.qcow2 ]
nbdcopy --synchronous -- [ qemu-nbd -r -f qcow2 disk.qcow2 ] - >piped.raw
`,
	},
	{
		name: "nbdinfo", needs: []string{"nbdinfo"}, calls: []string{"qemu-nbd"},
		text: disk + `
qemu-img snapshot -c before disk.qcow2
qemu-img bitmap --add disk.qcow2 dirty
qemu-io -c 'write -q -P 3 64k 128k' disk.qcow2
nbdinfo -- [ qemu-nbd -f qcow2 disk.qcow2 ]
nbdinfo --json -- [ qemu-nbd -r -A -B dirty -f qcow2 disk.qcow2 ]
nbdinfo --list -- [ qemu-nbd -r -x disk -D text -f qcow2 disk.qcow2 ]
nbdinfo --size -- [ qemu-nbd -r -o 1048576 -f qcow2 disk.qcow2 ]
nbdinfo --map=qemu:dirty-bitmap:dirty -- [ qemu-nbd -r -B dirty -f qcow2 disk.qcow2 ]
nbdinfo --map=qemu:allocation-depth -- [ qemu-nbd -r -A -f qcow2 disk.qcow2 ]
nbdinfo --map --totals -- [ qemu-nbd -r -l before -f qcow2 disk.qcow2 ]
nbdinfo --is read-only -- [ qemu-nbd -r -f qcow2 disk.qcow2 ]
fails nbdinfo --can trim -- [ qemu-nbd -r -f qcow2 disk.qcow2 ]
`,
	},
	{
		name: "nbdsh", needs: []string{"nbdsh"}, calls: []string{"qemu-nbd"},
		text: disk + `
cat >work.py <<'END'
h.add_meta_context("base:allocation")
h.connect_systemd_socket_activation(["qemu-nbd", "-f", "qcow2", "disk.qcow2"])
h.pwrite(b"drove" * 1000, 4096); h.zero(1 << 20, 2 << 20); h.trim(1 << 16, 4 << 20); h.flush()
print(h.get_size(), bytes(h.pread(5, 4096)), sum(h.pread(1 << 20, 2 << 20)), h.can_fua(), h.can_multi_conn())
seen = []
h.block_status(16 << 20, 0, lambda context, at, extents, err: seen.append((context, at, extents)))
print(seen[0][:2], sum(seen[0][2][::2]))
try:
    h.pwrite(b"x", 16 << 20)
except nbd.Error as err:
    print(err.errno)
h.shutdown()
END
nbdsh -c 'exec(open("work.py").read())'
`,
	},
	{
		name: "nbdkit", needs: []string{"nbdkit"}, calls: []string{"qemu-img", "qemu-io"},
		text: disk + `
nbdkit -U - pattern 4M --run 'qemu-img info --output=json "$nbd"; qemu-img info "$uri"'
nbdkit -U - pattern 4M --run 'qemu-img convert -f raw -O qcow2 "$nbd" pattern.qcow2'
nbdkit -U - pattern 1G --run 'qemu-io -r -f raw -c "read -v 1000k 64" "$uri"'
nbdkit -U - memory 4M --run 'qemu-io -f raw -c "write -P 3 0 1M" -c "read -P 3 0 1M" -c "read -P 0 1M 3M" -c "discard 0 64k" "$nbd"'
nbdkit -U - memory 64M --run '
  qemu-img create -q -f qcow2 "$nbd" 16M && qemu-img convert -n -O qcow2 disk.qcow2 "$nbd" &&
  qemu-img compare -F qcow2 disk.qcow2 "$nbd" && qemu-img check -q -f qcow2 "$nbd"'
nbdkit -U - --filter=cow --filter=truncate file disk.qcow2 truncate=64M --run '
  qemu-img snapshot -c s "$nbd" && qemu-io -f qcow2 -c "write -P 4 0 1M" "$nbd" && qemu-img check -q -f qcow2 "$nbd" &&
  qemu-img snapshot -a s "$nbd" && qemu-img compare -F qcow2 disk.qcow2 "$nbd"'
nbdkit -U - --filter=blocksize-policy --filter=offset file disk.qcow2 offset=0 blocksize-minimum=512 blocksize-error-policy=error \
  --run 'qemu-img compare -F qcow2 disk.qcow2 "$nbd"'
nbdkit -U - --filter=error pattern 4M error-pread-rate=100% error=ENOSPC --run '! qemu-img convert -f raw -O raw "$nbd" none.raw' 2>/dev/null
rm -f none.raw
nbdkit -U - null 8M --run 'qemu-img measure -O qcow2 "$nbd"; qemu-img map --output=json "$nbd"'
nbdkit -U - eval get_size='echo 1M' pread='dd if=/dev/zero count=$3 iflag=count_bytes status=none' \
  --run 'qemu-img convert -f raw -O raw "$nbd" eval.raw'
`,
	},
	{
		name: "oslo.utils", asks: "python3 -c 'import oslo_utils.imageutils'", calls: []string{"qemu-img"},
		text: disk + `
qemu-img create -q -f qcow2 -b disk.qcow2 -F qcow2 top.qcow2
qemu-img create -q -f raw plain.raw 3M
cat >parse.py <<'END'
import json, subprocess, sys
from oslo_utils import imageutils
for image in sys.argv[1:]:
    for form in "json", "human":
        said = subprocess.check_output(["qemu-img", "info", "--output=" + form, image], text=True)
        i = imageutils.QemuImgInfo(said, format=form)
        print(json.dumps([i.image, i.backing_file, i.file_format, i.virtual_size, i.cluster_size, len(i.snapshots),
                          i.encrypted, i.format_specific, i.corrupt if hasattr(i, "corrupt") else None], sort_keys=True))
END
python3 parse.py disk.qcow2 top.qcow2 plain.raw
`,
	},
	{
		// These functions of libguestfs need no virtual machine.
		name: "guestfish", wants: []string{"guestfish"}, calls: []string{"qemu-img"},
		text: `
guestfish <<'END' 2>&1
disk-create base.qcow2 qcow2 64M preallocation:metadata compat:1.1 clustersize:65536
disk-create top.qcow2 qcow2 -1 backingfile:base.qcow2 backingformat:qcow2
disk-create old.qcow2 qcow2 1M compat:0.10
disk-create sparse.raw raw 64M
disk-create full.raw raw 1M preallocation:full
disk-format base.qcow2
disk-format sparse.raw
disk-virtual-size top.qcow2
disk-has-backing-file top.qcow2
disk-has-backing-file base.qcow2
-disk-format missing.qcow2
END
`,
	},
}
