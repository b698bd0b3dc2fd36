package scsi_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/scsi"
	"github.com/droverproject/drover/storage"
)

const mib = 1 << 20

// newUnit returns a unit over a raw disk in memory, with its unit attention already told.
func newUnit(t testing.TB, size int64, o scsi.Options) (*scsi.Unit, block.Device) {
	t.Helper()
	f := storage.NewMemFile("disk.raw")
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	dev, err := block.NewRaw(f, block.RawOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = dev.Close() })
	if o.Serial == nil {
		o.Serial = func() string { return "12ab34cd-0000-4000-8000-000000000001" }
	}
	u, err := scsi.NewUnit(dev, o)
	if err != nil {
		t.Fatal(err)
	}
	if r := u.Execute(context.Background(), make([]byte, 6), nil); r.Status != scsi.CheckCondition || r.Sense[2] != 6 || r.Sense[12] != 0x29 {
		t.Fatalf("the first command is told of the power on: %+v", r)
	}
	return u, dev
}

// cdb builds a descriptor block of n bytes with an operation code and values at places.
func cdb(n int, op byte, at ...any) []byte {
	b := make([]byte, n)
	b[0] = op
	for i := 0; i < len(at); i += 2 {
		p := b[at[i].(int):]
		switch v := at[i+1].(type) {
		case byte:
			p[0] |= v
		case int:
			p[0] |= byte(v)
		case uint16:
			binary.BigEndian.PutUint16(p, v)
		case uint32:
			binary.BigEndian.PutUint32(p, v)
		case uint64:
			binary.BigEndian.PutUint64(p, v)
		default:
			panic(fmt.Sprintf("%T", v))
		}
	}
	return b
}

func rw16(op byte, lba uint64, n uint32) []byte { return cdb(16, op, 2, lba, 10, n) }

// split cuts a buffer at random places, as a transport's pages do.
func split(r *rand.Rand, b []byte) scsi.Buffer {
	var out scsi.Buffer
	for len(b) > 0 {
		n := 1 + r.IntN(len(b))
		if r.IntN(2) == 0 {
			n = min(len(b), 4096)
		}
		out, b = append(out, b[:n]), b[n:]
	}
	return out
}

func good(t testing.TB, u *scsi.Unit, c []byte, data scsi.Buffer) int {
	t.Helper()
	r := u.Execute(context.Background(), c, data)
	if r.Status != scsi.Good {
		t.Fatalf("command % x: status %#x, sense % x", c, r.Status, r.Sense)
	}
	return r.In
}

// in runs a command that answers with data and returns it.
func in(t testing.TB, u *scsi.Unit, c []byte) []byte {
	t.Helper()
	b := bytes.Repeat([]byte{0xEE}, 64<<10)
	n := good(t, u, c, scsi.Buffer{b})
	return b[:n]
}

// fails runs a command that must end with a sense key and code.
func fails(t testing.TB, u *scsi.Unit, c []byte, data scsi.Buffer, key byte, code uint16) []byte {
	t.Helper()
	r := u.Execute(context.Background(), c, data)
	if r.Status != scsi.CheckCondition || r.Sense[2]&15 != key || binary.BigEndian.Uint16(r.Sense[12:]) != code {
		t.Fatalf("command % x: status %#x, sense % x; want key %x code %04x", c, r.Status, r.Sense, key, code)
	}
	return r.Sense
}

// TestInquiry reads what the unit says of itself.
func TestInquiry(t *testing.T) {
	u, _ := newUnit(t, 16*mib, scsi.Options{Vendor: "ACME", Product: "a product with a long name"})
	b := in(t, u, cdb(6, 0x12, 3, uint16(255)))
	if b[0] != 0 || b[2] != 6 || b[3]&15 != 2 || int(b[4])+5 != len(b) || string(b[8:16]) != "ACME    " || string(b[16:32]) != "a product with a" {
		t.Errorf("INQUIRY: % x", b)
	}
	if b := in(t, u, cdb(6, 0x12, 3, uint16(36))); len(b) != 36 {
		t.Errorf("36 bytes allocated, %d came", len(b))
	}
	if b := in(t, u, cdb(6, 0x12)); len(b) != 0 {
		t.Errorf("nothing allocated, %d bytes came", len(b))
	}
	pages := in(t, u, cdb(6, 0x12, 1, 1, 3, uint16(255)))
	for _, page := range pages[4:] {
		b := in(t, u, cdb(6, 0x12, 1, 1, 2, page, 3, uint16(1024)))
		if b[1] != page || int(binary.BigEndian.Uint16(b[2:]))+4 != len(b) {
			t.Errorf("page %02x: % x", page, b)
		}
	}
	if b := in(t, u, cdb(6, 0x12, 1, 1, 2, 0x83, 3, uint16(1024))); !bytes.Equal(b[8:24], []byte{
		0x60, 0x01, 0x40, 0x51, 0x2a, 0xb3, 0x4c, 0xd0, 0x00, 0x04, 0x00, 0x08, 0x00, 0x00, 0x00, 0x00}) {
		t.Errorf("NAA designator: % x", b[4:24])
	}
	fails(t, u, cdb(6, 0x12, 1, 1, 2, 0x55, 3, uint16(255)), nil, 5, 0x2400)
	fails(t, u, cdb(6, 0x12, 2, 0x80, 3, uint16(255)), nil, 5, 0x2400)
}

// TestCapacity compares both forms with the disk, and has a change of size told.
// TestInquiryWithLUN: a LUN in the descriptor block, where SCSI-2 had it, does not matter.
func TestInquiryWithLUN(t *testing.T) {
	u, _ := newUnit(t, mib, scsi.Options{})
	page := scsi.Buffer{make([]byte, 96)}
	if r := u.Execute(context.Background(), cdb(6, 0x12, 1, 0x20, 4, 96), page); r.Status != scsi.Good {
		t.Errorf("%+v", r)
	}
	if r := u.Execute(context.Background(), cdb(6, 0x12, 1, 0x02, 4, 96), page); r.Status != scsi.CheckCondition {
		t.Errorf("CMDDT: %+v", r)
	}
}

// TestDataOutSize: data of another length than a descriptor block asks for is refused where it would be guesswork what to do.
func TestDataOutSize(t *testing.T) {
	u, _ := newUnit(t, mib, scsi.Options{})
	page := func(n int) scsi.Buffer { return scsi.Buffer{make([]byte, n)} }
	fails(t, u, rw16(0x93, 0, 8), page(1024), 5, 0x2400)                      // WRITE SAME with two blocks
	fails(t, u, cdb(16, 0x89, 13, 1), page(2048), 5, 0x2400)                  // COMPARE AND WRITE of one block with four
	fails(t, u, cdb(16, 0x89), page(1024), 5, 0x2400)                         // and of none with two
	fails(t, u, cdb(10, 0x48, 1, 0x01, 7, uint16(4)), page(4), 5, 0x2400)     // SANITIZE OVERWRITE with nothing
	fails(t, u, cdb(10, 0x48, 1, 0x01, 7, uint16(517)), page(517), 5, 0x2400) // and with more than a block
	good(t, u, cdb(16, 0x89), nil)
}

// TestUnmapReadsZeroes unmaps less than the device gives back at a time.
func TestUnmapReadsZeroes(t *testing.T) {
	u, _ := newUnit(t, mib, scsi.Options{})
	full := bytes.Repeat([]byte{7}, 8192)
	good(t, u, rw16(0x8A, 0, 16), scsi.Buffer{full})
	list := append([]byte{0, 22, 0, 16, 0, 0, 0, 0}, make([]byte, 16)...)
	list[8+7], list[8+11] = 3, 2
	good(t, u, cdb(10, 0x42, 7, uint16(24)), scsi.Buffer{list})
	got := make([]byte, 8192)
	good(t, u, rw16(0x88, 0, 16), scsi.Buffer{got})
	clear(full[3*512:][:2*512])
	if !bytes.Equal(got, full) {
		t.Error("unmapped blocks do not read as zeroes, or their neighbours do")
	}
}

func TestCapacity(t *testing.T) {
	for _, bs := range []int{512, 4096} {
		u, _ := newUnit(t, 16*mib+512, scsi.Options{BlockSize: bs})
		last := uint64((16*mib+512)/bs - 1)
		if b := in(t, u, cdb(10, 0x25)); uint64(binary.BigEndian.Uint32(b)) != last || int(binary.BigEndian.Uint32(b[4:])) != bs {
			t.Errorf("READ CAPACITY(10): % x", b)
		}
		b := in(t, u, cdb(16, 0x9E, 1, 0x10, 10, uint32(32)))
		if binary.BigEndian.Uint64(b) != last || int(binary.BigEndian.Uint32(b[8:])) != bs || len(b) != 32 {
			t.Errorf("READ CAPACITY(16): % x", b)
		}
		if 1<<(b[13]&15)*bs != 4096 {
			t.Errorf("physical block of %d", 1<<(b[13]&15)*bs)
		}
		u.CapacityChanged()
		fails(t, u, cdb(6, 0x00), nil, 6, 0x2A09)
		good(t, u, cdb(6, 0x00), nil)
	}
	f := storage.NewMemFile("small")
	dev, err := block.NewRaw(f, block.RawOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := scsi.NewUnit(dev, scsi.Options{}); err == nil {
		t.Error("a disk without a block")
	}
}

// TestUsageBits sets every bit that a command's usage map leaves out: each must be refused, and none that is in it may be
// for that reason.
func TestUsageBits(t *testing.T) {
	u, _ := newUnit(t, 16*mib, scsi.Options{})
	list := in(t, u, cdb(12, 0xA3, 1, 0x0C, 6, uint32(64<<10)))
	if int(binary.BigEndian.Uint32(list))+4 != len(list) || len(list) < 4+8*45 {
		t.Fatalf("REPORT SUPPORTED OPERATION CODES: %d bytes", len(list))
	}
	for at := 4; at < len(list); at += 8 {
		op, action, hasAction := list[at], list[at+3], list[at+5]&1 != 0
		form := 1
		if hasAction {
			form = 2
		}
		one := in(t, u, cdb(12, 0xA3, 1, 0x0C, 2, form, 3, op, 4, uint16(action), 6, uint32(255)))
		usage := one[4:]
		if one[1]&7 != 3 || usage[0] != op || len(usage) != int(list[at+7]) {
			t.Fatalf("opcode %02x: % x", op, one)
		}
		for bit := 8; bit < 8*len(usage); bit++ {
			if usage[bit/8]>>(bit%8)&1 != 0 || op == 0x12 && bit >= 8+5 && bit < 16 { // INQUIRY's LUN of old
				continue
			}
			c := make([]byte, len(usage))
			c[0] = op
			if hasAction {
				c[1] = action
			}
			c[bit/8] |= 1 << (bit % 8)
			if r := u.Execute(context.Background(), c, scsi.Buffer{make([]byte, 8192)}); r.Status != scsi.CheckCondition || r.Sense[2] != 5 {
				t.Errorf("opcode %02x takes bit %d of byte %d: %+v", op, bit%8, bit/8, r)
			}
		}
	}
	fails(t, u, cdb(6, 0x02), nil, 5, 0x2000)
	fails(t, u, cdb(16, 0x9E, 1, 0x1F), nil, 5, 0x2400)
}

// TestModel runs random medium commands against a byte slice.
func TestModel(t *testing.T) {
	for _, bs := range []int{512, 4096} {
		t.Run(fmt.Sprint(bs), func(t *testing.T) {
			r := rand.New(rand.NewPCG(1, uint64(bs)))
			const size = 4 * mib
			u, dev := newUnit(t, size, scsi.Options{BlockSize: bs})
			m := &model{t, r, u, make([]byte, size), int64(bs)}
			for range 3000 {
				m.step()
			}
			got := make([]byte, size)
			if err := dev.ReadAt(context.Background(), got, 0); err != nil || !bytes.Equal(got, m.disk) {
				t.Fatalf("the disk differs: %v", err)
			}
		})
	}
}

type model struct {
	t    *testing.T
	r    *rand.Rand
	u    *scsi.Unit
	disk []byte
	bs   int64
}

// extent draws blocks and returns them as bytes of the disk.
func (m *model) extent(most int64) (lba uint64, n uint32, on []byte) {
	total := int64(len(m.disk)) / m.bs
	first := m.r.Int64N(total)
	count := 1 + m.r.Int64N(min(total-first, most))
	return uint64(first), uint32(count), m.disk[first*m.bs : (first+count)*m.bs]
}

func (m *model) random(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(m.r.Uint32())
	}
	return b
}

// run runs a command, often without waiting if that can be done.
func (m *model) run(c []byte, data scsi.Buffer) int {
	m.t.Helper()
	if m.r.IntN(2) == 0 {
		if r, ok := m.u.TryExecute(c, data); ok {
			return r.In
		}
	}
	return good(m.t, m.u, c, data)
}

func (m *model) step() {
	t, u := m.t, m.u
	t.Helper()
	lba, n, on := m.extent(64)
	switch m.r.IntN(12) {
	case 0, 1, 2:
		ops := [][]byte{cdb(10, 0x2A, 2, uint32(lba), 7, uint16(n)), cdb(12, 0xAA, 2, uint32(lba), 6, n), rw16(0x8A, lba, n), rw16(0x8E, lba, n)}
		data := m.random(len(on))
		c := ops[m.r.IntN(len(ops))]
		if c[0] != 0x8E {
			c[1] |= byte(m.r.IntN(2)) * 8 // FUA
		} else {
			c[1] |= byte(m.r.IntN(2)) * 2 // BYTCHK
		}
		m.run(c, split(m.r, data))
		copy(on, data)
	case 3, 4, 5:
		ops := [][]byte{cdb(10, 0x28, 2, uint32(lba), 7, uint16(n)), cdb(12, 0xA8, 2, uint32(lba), 6, n), rw16(0x88, lba, n)}
		got := make([]byte, len(on))
		if k := m.run(ops[m.r.IntN(len(ops))], split(m.r, got)); k != len(on) || !bytes.Equal(got, on) {
			t.Fatalf("read of %d blocks at %d differs (%d bytes)", n, lba, k)
		}
	case 6:
		one := m.random(int(m.bs))
		if m.r.IntN(2) == 0 {
			clear(one)
		}
		good(t, u, rw16(0x93, lba, n), split(m.r, one))
		copy(on, bytes.Repeat(one, int(n)))
	case 7:
		c := rw16(0x93, lba, n)
		c[1] |= 1 // NDOB
		good(t, u, c, nil)
		clear(on)
	case 8:
		list := make([]byte, 24)
		binary.BigEndian.PutUint16(list, 22)
		binary.BigEndian.PutUint16(list[2:], 16)
		binary.BigEndian.PutUint64(list[8:], lba)
		binary.BigEndian.PutUint32(list[16:], n)
		good(t, u, cdb(10, 0x42, 7, uint16(24)), scsi.Buffer{list})
		got := make([]byte, len(on))
		good(t, u, rw16(0x88, lba, n), scsi.Buffer{got})
		for i := range got {
			if got[i] != 0 && got[i] != on[i] {
				t.Fatalf("after UNMAP byte %d is neither old nor zero", i)
			}
		}
		copy(on, got)
	case 9:
		want, next := bytes.Clone(on), m.random(len(on))
		c := cdb(16, 0x89, 2, lba, 13, byte(n))
		if m.r.IntN(3) == 0 {
			k := m.r.IntN(len(want))
			want[k] ^= 0x40
			sense := fails(t, u, c, split(m.r, append(want, next...)), 0xE, 0x1D00)
			if at := binary.BigEndian.Uint32(sense[3:]); int(at) != k || sense[0]&0x80 == 0 {
				t.Fatalf("miscompare at %d, reported at %d", k, at)
			}
			return
		}
		good(t, u, c, split(m.r, append(want, next...)))
		copy(on, next)
	case 10:
		data := m.random(len(on))
		good(t, u, rw16(0x8B, lba, n), split(m.r, data))
		for i := range on {
			on[i] |= data[i]
		}
	case 11:
		c := rw16(0x8F, lba, n)
		c[1] |= 2
		good(t, u, c, split(m.r, bytes.Clone(on)))
		bad := bytes.Clone(on)
		bad[m.r.IntN(len(bad))] ^= 1
		fails(t, u, c, split(m.r, bad), 0xE, 0x1D00)
		good(t, u, rw16(0x91, lba, n), nil)
	}
}

// TestRanges asks for blocks that are not there.
func TestRanges(t *testing.T) {
	u, _ := newUnit(t, mib, scsi.Options{})
	const total = mib / 512
	for _, op := range []byte{0x88, 0x8A, 0x8B, 0x8E, 0x8F, 0x90, 0x91, 0x93} {
		for _, r := range [][2]uint64{{total, 1}, {total - 1, 2}, {total + 1, 0}, {1 << 63, 1}, {^uint64(0), 1}, {0, 0xFFFFFFFF}} {
			fails(t, u, rw16(op, r[0], uint32(r[1])), scsi.Buffer{make([]byte, 1024)}, 5, 0x2100)
		}
	}
	good(t, u, rw16(0x88, total, 0), nil)
	short := make([]byte, 700)
	if n := good(t, u, rw16(0x88, 0, 4), scsi.Buffer{short}); n != 700 {
		t.Errorf("%d bytes of 700", n)
	}
}

// TestProtected tries to change a disk that must not be.
func TestProtected(t *testing.T) {
	u, dev := newUnit(t, mib, scsi.Options{ReadOnly: true})
	for _, c := range [][]byte{rw16(0x8A, 0, 1), rw16(0x93, 0, 1), cdb(10, 0x42, 7, uint16(24)), cdb(16, 0x89, 13, 1), cdb(10, 0x48, 1, 2), cdb(6, 0x04)} {
		fails(t, u, c, scsi.Buffer{bytes.Repeat([]byte{1}, 1024)}, 7, 0x2700)
	}
	if b := in(t, u, cdb(6, 0x1A, 2, 0x3F, 4, 255)); b[2]&0x80 == 0 {
		t.Error("MODE SENSE does not say that the disk is protected")
	}
	got := make([]byte, mib)
	if err := dev.ReadAt(context.Background(), got, 0); err != nil || len(bytes.Trim(got, "\x00")) != 0 {
		t.Errorf("changed: %v", err)
	}
}

// TestMode sets what can be set, and tries what cannot.
func TestMode(t *testing.T) {
	u, _ := newUnit(t, mib, scsi.Options{})
	page := func(control, code byte) []byte {
		b := in(t, u, cdb(10, 0x5A, 1, 8, 2, control<<6|code, 7, uint16(512)))
		return b[8:]
	}
	for _, code := range []byte{0x01, 0x08, 0x0A, 0x1C} {
		now, can := page(0, code), page(1, code)
		for i := 2; i < len(now); i++ {
			for bit := range 8 {
				next := bytes.Clone(now)
				next[i] ^= 1 << bit
				list := append(make([]byte, 8), next...)
				c := cdb(10, 0x55, 1, 0x10, 7, uint16(len(list)))
				if can[i]>>bit&1 == 0 {
					r := u.Execute(context.Background(), c, scsi.Buffer{list})
					if r.Status != scsi.CheckCondition {
						t.Errorf("page %02x: bit %d of byte %d could be changed", code, bit, i)
					}
					continue
				}
				good(t, u, c, scsi.Buffer{list})
				if got := page(0, code); !bytes.Equal(got, next) {
					t.Errorf("page %02x: % x, want % x", code, got, next)
				}
				good(t, u, c, scsi.Buffer{append(make([]byte, 8), now...)})
			}
		}
	}
	fails(t, u, cdb(6, 0x1A, 2, 0xC0|0x08, 4, 255), nil, 5, 0x3900)
	fails(t, u, cdb(6, 0x1A, 2, 0x02, 4, 255), nil, 5, 0x2400)
}

// TestDescriptorSense has the unit tell its sense data in the other format.
func TestDescriptorSense(t *testing.T) {
	u, _ := newUnit(t, mib, scsi.Options{})
	list := make([]byte, 20)
	list[8], list[9], list[10], list[11] = 0x0A, 10, 4, 0x10
	good(t, u, cdb(10, 0x55, 1, 0x10, 7, uint16(20)), scsi.Buffer{list})
	r := u.Execute(context.Background(), rw16(0x88, 1<<40, 1), nil)
	if r.Sense[0] != 0x72 || r.Sense[1] != 5 || r.Sense[2] != 0x21 || binary.BigEndian.Uint64(r.Sense[12:]) != 1<<40 {
		t.Errorf("% x", r.Sense)
	}
}

// TestLBAStatus compares GET LBA STATUS with what was written.
func TestLBAStatus(t *testing.T) {
	u, _ := newUnit(t, 4*mib, scsi.Options{})
	good(t, u, rw16(0x8A, 2048, 256), scsi.Buffer{bytes.Repeat([]byte{1}, 128<<10)})
	b := in(t, u, cdb(16, 0x9E, 1, 0x12, 10, uint32(4096)))
	var got []string
	for at := 8; at < len(b); at += 16 {
		got = append(got, fmt.Sprintf("%d+%d:%d", binary.BigEndian.Uint64(b[at:]), binary.BigEndian.Uint32(b[at+8:]), b[at+12]))
	}
	if want := "[0+2048:1 2048+256:0 2304+5888:1]"; fmt.Sprint(got) != want {
		t.Errorf("%v, want %s", got, want)
	}
	fails(t, u, cdb(16, 0x9E, 1, 0x12, 2, uint64(4*mib/512), 10, uint32(64)), nil, 5, 0x2100)
}

// TestCompareAndWriteIsAtomic has many initiators count in one block; every increment must survive, also beside ordinary
// writes to the neighbourhood and bit setters in another block.
func TestCompareAndWriteIsAtomic(t *testing.T) {
	u, _ := newUnit(t, mib, scsi.Options{})
	const clients, each = 8, 40
	var wg sync.WaitGroup
	for id := range clients {
		wg.Go(func() {
			for range each {
				for !increment(t, u) {
				}
			}
			bit := make([]byte, 512)
			bit[id] = 1 << (id % 8)
			good(t, u, rw16(0x8B, 5, 1), scsi.Buffer{bit})
			good(t, u, rw16(0x8A, uint64(100+id), 1), scsi.Buffer{bit})
		})
	}
	wg.Wait()
	got := make([]byte, 3072)
	good(t, u, rw16(0x88, 0, 6), scsi.Buffer{got})
	if n := binary.BigEndian.Uint32(got); n != clients*each {
		t.Errorf("counted to %d, want %d", n, clients*each)
	}
	for id := range clients {
		if got[5*512+id] != 1<<(id%8) {
			t.Errorf("bit of client %d lost", id)
		}
	}
}

func increment(t *testing.T, u *scsi.Unit) bool {
	buf := make([]byte, 1024)
	good(t, u, rw16(0x88, 0, 1), scsi.Buffer{buf[:512]})
	copy(buf[512:], buf[:512])
	binary.BigEndian.PutUint32(buf[512:], binary.BigEndian.Uint32(buf)+1)
	return u.Execute(context.Background(), cdb(16, 0x89, 13, 1), scsi.Buffer{buf}).Status == scsi.Good
}

// copyList makes the parameter list of an EXTENDED COPY of one segment.
func copyList(from, to [16]byte, fromLBA, toLBA uint64, n uint16) []byte {
	b := make([]byte, 16+2*32+28)
	be := binary.BigEndian
	be.PutUint16(b[2:], 64)
	be.PutUint32(b[8:], 28)
	for i, name := range [][16]byte{from, to} {
		d := b[16+32*i:]
		d[0], d[4], d[5], d[7] = 0xE4, 1, 3, 16
		copy(d[8:], name[:])
		d[28], d[29], d[30], d[31] = 0, 0, 2, 0
	}
	s := b[80:]
	s[0], s[1] = 2, 2
	be.PutUint16(s[2:], 24)
	be.PutUint16(s[6:], 1)
	be.PutUint16(s[10:], n)
	be.PutUint64(s[12:], fromLBA)
	be.PutUint64(s[20:], toLBA)
	return b
}

// name reads a unit's NAA designator.
func name(t *testing.T, u *scsi.Unit) (naa [16]byte) {
	copy(naa[:], in(t, u, cdb(6, 0x12, 1, 1, 2, 0x83, 3, uint16(255)))[8:24])
	return naa
}

// TestExtendedCopy copies within a unit and between two.
func TestExtendedCopy(t *testing.T) {
	other, _ := newUnit(t, mib, scsi.Options{Serial: func() string { return "ffff0000-1111-2222-3333-444455556666" }})
	far := name(t, other)
	u, _ := newUnit(t, mib, scsi.Options{Peer: func(naa [16]byte) *scsi.Unit {
		if naa == far {
			return other
		}
		return nil
	}})
	me := name(t, u)
	data := bytes.Repeat([]byte("copy"), 1024)
	good(t, u, rw16(0x8A, 0, 8), scsi.Buffer{data})
	run := func(list []byte) []byte { return cdb(16, 0x83, 10, uint32(len(list))) }
	list := copyList(me, far, 0, 100, 8)
	good(t, u, run(list), scsi.Buffer{list})
	got := make([]byte, 4096)
	good(t, other, rw16(0x88, 100, 8), scsi.Buffer{got})
	if !bytes.Equal(got, data) {
		t.Error("not copied to the other unit")
	}
	list = copyList(me, me, 0, 4, 8) // overlapping
	good(t, u, run(list), scsi.Buffer{list})
	good(t, u, rw16(0x88, 4, 8), scsi.Buffer{got})
	if !bytes.Equal(got, data) {
		t.Error("an overlapping copy took what it had written itself")
	}
	list = copyList(me, [16]byte{1}, 0, 0, 1)
	fails(t, u, run(list), scsi.Buffer{list}, 0xA, 0x0804)
	list = copyList(me, far, mib/512, 0, 1)
	fails(t, u, run(list), scsi.Buffer{list}, 0xA, 0)
	if b := in(t, u, cdb(16, 0x84, 1, 3, 10, uint32(255))); int(binary.BigEndian.Uint32(b))+4 != len(b) {
		t.Errorf("operating parameters: % x", b)
	}
	if b := in(t, u, cdb(16, 0x84, 1, 0, 10, uint32(255))); b[4] != 2 {
		t.Errorf("status of a failed copy: % x", b)
	}
}

// TestPortGroups takes the unit to standby and back.
func TestPortGroups(t *testing.T) {
	u, _ := newUnit(t, mib, scsi.Options{})
	set := func(state byte) {
		good(t, u, cdb(12, 0xA4, 1, 0x0A, 6, uint32(8)), scsi.Buffer{{0, 0, 0, 0, state, 0, 0, 1}})
	}
	set(2)
	if b := in(t, u, cdb(12, 0xA3, 1, 0x0A, 6, uint32(255))); b[4]&15 != 2 {
		t.Errorf("% x", b)
	}
	fails(t, u, rw16(0x88, 0, 1), scsi.Buffer{make([]byte, 512)}, 2, 0x040B)
	set(0)
	good(t, u, rw16(0x88, 0, 1), scsi.Buffer{make([]byte, 512)})
	fails(t, u, cdb(12, 0xA4, 1, 0x0A, 6, uint32(8)), scsi.Buffer{{0, 0, 0, 0, 9, 0, 0, 1}}, 5, 0x2600)
}

// TestSanitize wipes the disk.
func TestSanitize(t *testing.T) {
	u, dev := newUnit(t, mib, scsi.Options{})
	good(t, u, rw16(0x8A, 10, 100), scsi.Buffer{bytes.Repeat([]byte{9}, 51200)})
	list := []byte{1, 0, 0, 4, 0xDE, 0xAD, 0xBE, 0xEF}
	good(t, u, cdb(10, 0x48, 1, 1, 7, uint16(8)), scsi.Buffer{list})
	got := make([]byte, mib)
	if err := dev.ReadAt(context.Background(), got, 0); err != nil || !bytes.Equal(got, bytes.Repeat(list[4:], mib/4)) {
		t.Errorf("overwrite: %v", err)
	}
	good(t, u, cdb(10, 0x48, 1, 2), nil)
	if err := dev.ReadAt(context.Background(), got, 0); err != nil || len(bytes.Trim(got, "\x00")) != 0 {
		t.Errorf("erase: %v", err)
	}
}

// FuzzExecute throws descriptor blocks and data at a unit: whatever comes, it answers, and never with more data than
// the buffer holds.
func FuzzExecute(f *testing.F) {
	f.Add([]byte{0x12, 1, 0x83, 0, 255, 0}, []byte{}, uint16(300))
	f.Add(rw16(0x88, 1, 2), []byte{1}, uint16(1024))
	f.Add(cdb(16, 0x83, 10, uint32(108)), copyList([16]byte{}, [16]byte{}, 0, 1, 1), uint16(108))
	f.Add(cdb(10, 0x55, 1, 0x10, 7, uint16(20)), make([]byte, 20), uint16(20))
	f.Fuzz(func(t *testing.T, c, data []byte, room uint16) {
		u, _ := newUnit(t, 256<<10, scsi.Options{})
		buf := make([]byte, room)
		copy(buf, data)
		half := len(buf) / 2
		r := u.Execute(context.Background(), c, scsi.Buffer{buf[:half], buf[half:]})
		if r.In < 0 || r.In > len(buf) {
			t.Fatalf("%d bytes in a buffer of %d", r.In, len(buf))
		}
		if r.Status == scsi.CheckCondition && (len(r.Sense) < 8 || len(r.Sense) > 96) {
			t.Fatalf("sense data of %d bytes", len(r.Sense))
		}
	})
}
