package hostile

import (
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/droverproject/drover/test/harness"
	"github.com/droverproject/drover/test/peer"
)

// Guest clusters of every base image, and what they hold. A cluster is cs bytes.
const (
	dataCluster    = 0 // to 3: normal, filled with dataByte
	zeroCluster    = 4 // zero, without a host cluster
	preallocated   = 5 // zero, with a host cluster
	squeezed       = 6 // and 7: compressed, sharing a host cluster, filled with squeezedByte
	emptyCluster   = 9 // unallocated
	farCluster     = 512
	dataByte       = 0x11
	squeezedByte   = 0x22
	farByte        = 0x33
	diskSize       = 8 << 20
	offsetMask     = 0x00fffffffffffe00
	copied         = 1 << 63
	compressed     = 1 << 62
	zeroFlag       = 1
	extBackingFmt  = 0xe2792aca
	extNames       = 0x6803f857
	extBitmaps     = 0x23852875
	extCrypto      = 0x0537be77
	extData        = 0x44415441
	secret         = "hunter2"
	backingContent = 0x44
)

// Fields of the header.
const (
	hMagic       = 0
	hVersion     = 4
	hBackingOff  = 8
	hBackingLen  = 16
	hClusterBits = 20
	hSize        = 24
	hCrypt       = 32
	hL1Size      = 36
	hL1          = 40
	hRefTable    = 48
	hRefClusters = 56
	hSnapCount   = 60
	hSnaps       = 64
	hIncompat    = 72
	hCompat      = 80
	hAutoclear   = 88
	hOrder       = 96
	hLength      = 100
	hCompression = 104
)

// img is the bytes of an image that is about to be damaged. It reads the format by itself, on purpose: nothing here
// depends on the code under test.
type img struct {
	t testing.TB
	b []byte
}

func (m *img) need(off uint64, n int) []byte {
	if off+uint64(n) > uint64(len(m.b)) {
		m.b = append(m.b, make([]byte, off+uint64(n)-uint64(len(m.b)))...)
	}
	return m.b[off : off+uint64(n)]
}

func (m *img) u32(off uint64) uint32      { return binary.BigEndian.Uint32(m.need(off, 4)) }
func (m *img) u64(off uint64) uint64      { return binary.BigEndian.Uint64(m.need(off, 8)) }
func (m *img) p8(off uint64, v uint8)     { m.need(off, 1)[0] = v }
func (m *img) p16(off uint64, v uint16)   { binary.BigEndian.PutUint16(m.need(off, 2), v) }
func (m *img) p32(off uint64, v uint32)   { binary.BigEndian.PutUint32(m.need(off, 4), v) }
func (m *img) p64(off, v uint64)          { binary.BigEndian.PutUint64(m.need(off, 8), v) }
func (m *img) or64(off, v uint64)         { m.p64(off, m.u64(off)|v) }
func (m *img) put(off uint64, p []byte)   { copy(m.need(off, len(p)), p) }
func (m *img) cs() uint64                 { return 1 << m.u32(hClusterBits) }
func (m *img) end() uint64                { return (uint64(len(m.b)) + m.cs() - 1) &^ (m.cs() - 1) }
func (m *img) l1e(i uint64) uint64        { return m.u64(hL1) + 8*i }
func (m *img) l2(i uint64) uint64         { return m.u64(m.l1e(i)) & offsetMask }
func (m *img) data(cluster uint64) uint64 { return m.u64(m.l2e(cluster)) & offsetMask }
func (m *img) refTable() uint64           { return m.u64(hRefTable) }
func (m *img) refBlock() uint64           { return m.u64(m.refTable()) }
func (m *img) snaps() uint64              { return m.u64(hSnaps) }

// l2e is where the L2 entry of a guest cluster is.
func (m *img) l2e(cluster uint64) uint64 {
	size := uint64(8)
	if m.u32(hVersion) >= 3 && m.u64(hIncompat)&16 != 0 {
		size = 16
	}
	per := m.cs() / size
	return m.l2(cluster/per) + cluster%per*size
}

// ref16 is where the refcount of the host cluster at off is, in an image with 16 bits for each.
func (m *img) ref16(off uint64) uint64 { return m.refBlock() + off/m.cs()*2 }

// setRef sets the refcount of the host cluster at off, whatever its width.
func (m *img) setRef(off, v uint64) {
	bits := uint64(1) << m.u32(hOrder)
	i := off / m.cs()
	if bits < 8 {
		at, shift := m.refBlock()+i*bits/8, i*bits%8
		mask := byte(1<<bits-1) << shift
		m.p8(at, m.need(at, 1)[0]&^mask|byte(v<<shift)&mask)
		return
	}
	p := m.need(m.refBlock()+i*bits/8, int(bits/8))
	for k := range p {
		p[len(p)-1-k] = byte(v >> (8 * k))
	}
}

// ext is where the header extension of that type begins, with its type and length.
func (m *img) ext(kind uint32) uint64 {
	off := uint64(m.u32(hLength))
	if m.u32(hVersion) == 2 {
		off = 72
	}
	for off+8 <= m.cs() {
		if m.u32(off) == kind {
			return off
		}
		if m.u32(off) == 0 {
			break
		}
		off += 8 + (uint64(m.u32(off+4))+7)&^7
	}
	m.t.Fatalf("the image has no extension %#x", kind)
	return 0
}

// addExt puts an extension in front of the others. There must be no backing file name in the way.
func (m *img) addExt(kind uint32, length uint32, data []byte) {
	at := uint64(m.u32(hLength))
	ext := binary.BigEndian.AppendUint32(nil, kind)
	ext = binary.BigEndian.AppendUint32(ext, length)
	ext = append(ext, data...)
	ext = append(ext, make([]byte, (8-len(ext)%8)%8)...)
	head := append([]byte{}, m.b[at:m.cs()]...)
	m.put(at, ext)
	m.put(at+uint64(len(ext)), head[:len(head)-len(ext)])
}

// backing makes the image name a backing file, and no format for it.
func (m *img) backing(name string) {
	at := m.cs() - 1024
	m.p64(hBackingOff, at)
	m.p32(hBackingLen, uint32(len(name)))
	m.put(at, []byte(name))
}

// base is a kind of sound image that damages begin from.
type base struct {
	name    string
	create  []string // further arguments of qemu-img create
	cs      int64
	plain   bool // neither zero clusters nor compressed ones
	after   func(t testing.TB, dir, image string)
	encrypt bool
}

var bases = []base{
	{name: "64k", cs: 65536},
	{name: "4k", cs: 4096},
	{name: "v2", cs: 4096, create: []string{"-o", "compat=0.10"}},
	{name: "zstd", cs: 4096, create: []string{"-o", "compression_type=zstd"}},
	{name: "ext", cs: 16384, create: []string{"-o", "extended_l2=on"}},
	{name: "ref1", cs: 4096, create: []string{"-o", "refcount_bits=1"}, plain: true},
	{name: "ref2", cs: 4096, create: []string{"-o", "refcount_bits=2"}},
	{name: "ref4", cs: 4096, create: []string{"-o", "refcount_bits=4"}},
	{name: "ref8", cs: 4096, create: []string{"-o", "refcount_bits=8"}},
	{name: "ref32", cs: 4096, create: []string{"-o", "refcount_bits=32"}},
	{name: "ref64", cs: 4096, create: []string{"-o", "refcount_bits=64"}},
	{name: "snap", cs: 4096, after: func(t testing.TB, _, image string) {
		harness.Must(t, "qemu-img", "snapshot", "-c", "one", image)
		harness.Must(t, "qemu-io", "-f", "qcow2", "-c", fmt.Sprintf("write -q -P %d 0 4k", dataByte), image)
		harness.Must(t, "qemu-img", "snapshot", "-c", "two", image)
		harness.Must(t, "qemu-io", "-f", "qcow2", "-c", fmt.Sprintf("write -q -P %d 0 8k", dataByte), image)
	}},
	{name: "bitmap", cs: 4096, after: func(t testing.TB, _, image string) {
		harness.Must(t, "qemu-img", "bitmap", "--add", "-g", "4096", image, "one")
		harness.Must(t, "qemu-img", "bitmap", "--add", "--disable", "-g", "65536", image, "two")
		harness.Must(t, "qemu-io", "-f", "qcow2", "-c", fmt.Sprintf("write -q -P %d 0 8k", dataByte), image)
	}},
	{name: "data", cs: 4096, create: []string{"-o", "data_file=DIR/data.raw"}, plain: true},
	{name: "luks", cs: 65536, plain: true, encrypt: true, create: []string{"--object", "secret,id=s,data=" + secret,
		"-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"}},
}

// sources makes the base images, once each for the whole process.
type sources struct {
	mu   sync.Mutex
	made map[string][]byte
	data []byte // what the external data file of base "data" holds
}

var made = sources{made: map[string][]byte{}}

func baseNamed(t testing.TB, name string) base {
	for _, b := range bases {
		if b.name == name {
			return b
		}
	}
	t.Fatalf("no base image is called %q", name)
	return base{}
}

// bytes returns a fresh copy of a base image.
func (s *sources) bytes(t testing.TB, b base) []byte {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.made[b.name] == nil {
		s.made[b.name] = s.make(t, b)
	}
	return append([]byte{}, s.made[b.name]...)
}

func (s *sources) make(t testing.TB, b base) []byte {
	t.Helper()
	dir := harness.SocketDir(t) // a path without commas, which the tests' names have
	image := filepath.Join(dir, "image.qcow2")
	create := []string{"create", "-q", "-f", "qcow2", "-o", fmt.Sprintf("cluster_size=%d", b.cs)}
	for _, arg := range b.create {
		create = append(create, strings.ReplaceAll(arg, "DIR", dir))
	}
	create = append(create, image, fmt.Sprint(diskSize))
	// QEMU gauges the processor before it encrypts, and now and then the kernel's clock is too coarse for that.
	r := harness.Run(t, "qemu-img", create...)
	for tries := 0; b.encrypt && r.Code != 0 && tries < 50; tries++ {
		r = harness.Run(t, "qemu-img", create...)
	}
	if r.Code != 0 {
		t.Fatalf("making the base image %s:\n%s", b.name, r)
	}
	cs := b.cs
	cmds := []string{fmt.Sprintf("write -q -P %d 0 %d", dataByte, 4*cs)}
	if !b.plain {
		cmds = append(cmds,
			fmt.Sprintf("write -q -P 1 %d %d", preallocated*cs, cs),
			fmt.Sprintf("write -q -z %d %d", zeroCluster*cs, 2*cs),
			fmt.Sprintf("write -q -c -P %d %d %d", squeezedByte, squeezed*cs, cs),
			fmt.Sprintf("write -q -c -P %d %d %d", squeezedByte, (squeezed+1)*cs, cs))
		if b.name == "v2" { // which has no zero clusters
			cmds = append(cmds[:1], cmds[3:]...)
		}
	}
	if farCluster*cs < diskSize {
		cmds = append(cmds, fmt.Sprintf("write -q -P %d %d %d", farByte, farCluster*cs, cs))
	}
	harness.Must(t, "qemu-io", append(stockArgs(b, image, false), commands(cmds)...)...)
	if b.after != nil {
		b.after(t, dir, image)
	}
	data, err := os.ReadFile(image)
	harness.OK(t, err)
	if b.name == "data" {
		s.data, err = os.ReadFile(filepath.Join(dir, "data.raw"))
		harness.OK(t, err)
		// The name as an image that moves has it: beside the image.
		m := &img{t, data}
		at := m.ext(extData)
		m.p32(at, 0x01010101) // a type that nobody knows takes its place, whatever its length
		m.addExt(extData, 8, []byte("data.raw"))
		data = m.b
	}
	return data
}

// stockArgs are the arguments with which qemu-io opens an image.
func stockArgs(b base, image string, readOnly bool) []string {
	var args []string
	if readOnly {
		args = append(args, "-r")
	}
	if b.encrypt {
		return append(args, "--object", "secret,id=s,data="+secret, "--image-opts",
			"driver=qcow2,encrypt.key-secret=s,file.filename="+image)
	}
	return append(args, "-f", "qcow2", image)
}

func commands(cmds []string) []string {
	var args []string
	for _, c := range cmds {
		args = append(args, "-c", c)
	}
	return args
}

// stockVersion tells whether the qemu-img here is the one that the tables speak of.
var stockIsThatOfTheTables = sync.OnceValue(func() bool {
	out, err := exec.Command(peer.Path("qemu-img"), "--version").Output()
	return err == nil && strings.Contains(string(out), "version 7.2.")
})

func peerNeeded(t testing.TB) { t.Helper(); peer.Need(t, "qemu-img", "qemu-io") }
