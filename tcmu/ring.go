package tcmu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/droverproject/drover/scsi"
)

// The mailbox, at the beginning of the mapping (target_core_user.h).
const (
	offVersion  = 0  // u16
	offFlags    = 2  // u16
	offRing     = 4  // u32: where the ring begins
	offRingSize = 8  // u32
	offHead     = 12 // u32: the kernel's
	offTail     = 64 // u32: ours, on a cache line of its own
	mailboxSize = 128

	mailboxVersion = 2
)

// Flags of the mailbox: what the kernel can do.
const (
	CapOutOfOrder = 1 << 0
	CapReadLen    = 1 << 1
	CapTaskNotice = 1 << 2
	CapKeepBuffer = 1 << 3
)

// An entry of the ring.
const (
	entLenOp  = 0 // u32: length, of which the low three bits are the opcode
	entID     = 4 // u16
	entFlags  = 7 // u8: ours
	entHeader = 8

	reqVectors  = 8  // u32
	reqBidi     = 12 // u32
	reqCDB      = 24 // u64
	reqIOV      = 48
	iovSize     = 16
	rspStatus   = 8
	rspReadLen  = 12
	rspSense    = 16
	senseSize   = 96
	minCommand  = rspSense + senseSize
	tmrType     = 8
	tmrCount    = 12
	tmrIDs      = 32
	maxVectors  = 64 << 10
	maxCDB      = 260
	opMask      = 7
	opPad       = 0
	opCommand   = 1
	opTask      = 2
	flagUnknown = 1 << 0
	flagReadLen = 1 << 1
)

// ErrRing is wrapped by every error about a ring that does not follow its own rules.
var ErrRing = errors.New("the command ring is broken")

func broken(f string, a ...any) error { return fmt.Errorf("%w: %s", ErrRing, fmt.Sprintf(f, a...)) }

// Ring is the memory shared with the kernel for one device. Next is called by one goroutine; Complete by any.
type Ring struct {
	mem   []byte
	ring  []byte
	flags uint16
	next  atomic.Uint32 // the entry that Next looks at; changed by Next only

	free sync.Pool // of commands that were released

	mu      sync.Mutex
	tail    uint32
	running [1 << 16 / 64]uint64 // a bit for each identifier: taken and not completed
	taken   int                  // how many are
}

// NewRing takes over a mapping. Its first entry is the one at the tail: what lies between tail and head was not completed by
// whoever served the device before.
func NewRing(mem []byte) (*Ring, error) {
	if len(mem) < mailboxSize || uintptr(unsafe.Pointer(unsafe.SliceData(mem)))%8 != 0 {
		return nil, broken("mapping of %d bytes", len(mem))
	}
	ne := binary.NativeEndian
	if v := ne.Uint16(mem[offVersion:]); v != mailboxVersion {
		return nil, fmt.Errorf("the kernel's mailbox has version %d, and this program knows %d", v, mailboxVersion)
	}
	off, size := ne.Uint32(mem[offRing:]), ne.Uint32(mem[offRingSize:])
	if off < mailboxSize || off%8 != 0 || size < minCommand || size%8 != 0 || uint64(off)+uint64(size) > uint64(len(mem)) {
		return nil, broken("ring of %d bytes at %d in a mapping of %d", size, off, len(mem))
	}
	r := &Ring{mem: mem, ring: mem[off:][:size:size], flags: ne.Uint16(mem[offFlags:])}
	if r.flags&CapOutOfOrder == 0 {
		return nil, errors.New("the kernel's TCMU wants commands completed in order: it is too old")
	}
	r.tail = r.word(offTail).Load()
	if r.tail >= size || r.tail%8 != 0 {
		return nil, broken("tail at %d of %d", r.tail, size)
	}
	r.next.Store(r.tail)
	return r, nil
}

// word returns a word of the mailbox, which the other side changes too.
func (r *Ring) word(off int) *atomic.Uint32 {
	return (*atomic.Uint32)(unsafe.Pointer(&r.mem[off]))
}

// Command is a SCSI command from the kernel.
type Command struct {
	ID   uint16
	CDB  []byte
	Data scsi.Buffer // pages of the data area
	// Bidi is where the data-in of a command goes that has data in both directions.
	Bidi scsi.Buffer
}

// Release gives a command back that was completed, and that nobody looks at any more: its memory serves the next one.
func (r *Ring) Release(c *Command) {
	clear(c.Data)
	clear(c.Bidi)
	r.free.Put(c)
}

// TaskNotice says that commands were aborted. They are completed like all others.
type TaskNotice struct {
	Type uint8
	IDs  []uint16
}

// Next returns the next entry: a command, or a notice. Both are nil when there is none.
func (r *Ring) Next() (*Command, *TaskNotice, error) {
	size := uint32(len(r.ring))
	for {
		head := r.word(offHead).Load() // acquires what the kernel wrote before
		if head >= size || head%8 != 0 {
			return nil, nil, broken("head at %d of %d", head, size)
		}
		at := r.next.Load()
		if at == head {
			return nil, nil, nil
		}
		e, err := r.entry(at)
		if err != nil {
			return nil, nil, err
		}
		if uint32(len(e)) > (head+size-at)%size {
			return nil, nil, broken("entry at %d passes the head at %d", at, head)
		}
		r.next.Store((at + uint32(len(e))) % size)
		switch op := binary.NativeEndian.Uint32(e) & opMask; op {
		case opPad:
		case opTask:
			n, err := notice(e)
			return nil, n, err
		case opCommand:
			c, err := r.command(e)
			return c, nil, err
		default:
			return nil, nil, broken("entry at %d has opcode %d", at, op)
		}
	}
}

// entry returns the bytes of the entry at an offset.
func (r *Ring) entry(at uint32) ([]byte, error) {
	n := binary.NativeEndian.Uint32(r.ring[at:]) &^ opMask
	if n < entHeader || uint64(at)+uint64(n) > uint64(len(r.ring)) {
		return nil, broken("entry at %d has %d bytes", at, n)
	}
	return r.ring[at:][:n:n], nil
}

func notice(e []byte) (*TaskNotice, error) {
	ne := binary.NativeEndian
	if len(e) < tmrIDs {
		return nil, broken("task management notice of %d bytes", len(e))
	}
	n := ne.Uint32(e[tmrCount:])
	if uint64(n)*2 > uint64(len(e)-tmrIDs) {
		return nil, broken("task management notice about %d commands in %d bytes", n, len(e))
	}
	t := &TaskNotice{Type: e[tmrType]}
	for i := range n {
		t.IDs = append(t.IDs, ne.Uint16(e[tmrIDs+2*i:]))
	}
	return t, nil
}

// command copies out of an entry all that a command needs but its data.
func (r *Ring) command(e []byte) (*Command, error) {
	ne := binary.NativeEndian
	if len(e) < minCommand {
		return nil, broken("command entry of %d bytes", len(e))
	}
	c, ok := r.free.Get().(*Command)
	if !ok {
		c = new(Command)
	}
	c.ID = ne.Uint16(e[entID:])
	out, bidi := uint64(ne.Uint32(e[reqVectors:])), uint64(ne.Uint32(e[reqBidi:]))
	if out > maxVectors || bidi > maxVectors || reqIOV+(out+bidi)*iovSize > uint64(len(e)) {
		return nil, broken("command %d has %d and %d vectors in %d bytes", c.ID, out, bidi, len(e))
	}
	var err error
	if c.CDB, err = r.cdb(c.CDB[:0], ne.Uint64(e[reqCDB:])); err != nil {
		return nil, err
	}
	if c.Data, err = r.vectors(c.Data[:0], e[reqIOV:][:out*iovSize]); err != nil {
		return nil, err
	}
	if c.Bidi, err = r.vectors(c.Bidi[:0], e[reqIOV+out*iovSize:][:bidi*iovSize]); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.running[c.ID/64]>>(c.ID%64)&1 != 0 {
		return nil, broken("command %d came twice", c.ID)
	}
	r.running[c.ID/64] |= 1 << (c.ID % 64)
	r.taken++
	return c, nil
}

// cdb appends a descriptor block, whose length its operation code tells.
func (r *Ring) cdb(to []byte, off uint64) ([]byte, error) {
	if off >= uint64(len(r.mem)) {
		return nil, broken("descriptor block at %#x", off)
	}
	b := r.mem[off:]
	n := 16
	switch b[0] >> 5 {
	case 0:
		n = 6
	case 1, 2:
		n = 10
	case 5:
		n = 12
	case 3: // variable length, with an additional length in byte 7
		if len(b) >= 8 {
			n = 8 + int(b[7])
		}
	}
	if n > len(b) || n > maxCDB+8 {
		return nil, broken("descriptor block of %d bytes at %#x", n, off)
	}
	return append(to, b[:n]...), nil
}

func (r *Ring) vectors(b scsi.Buffer, raw []byte) (scsi.Buffer, error) {
	ne := binary.NativeEndian
	for ; len(raw) > 0; raw = raw[iovSize:] {
		base, n := ne.Uint64(raw), ne.Uint64(raw[8:])
		if n > uint64(len(r.mem)) || base > uint64(len(r.mem))-n || base < mailboxSize {
			return nil, broken("vector of %d bytes at %#x", n, base)
		}
		if n > 0 {
			b = append(b, r.mem[base:][:n:n])
		}
	}
	return b, nil
}

// Result is how a command ended.
type Result struct {
	scsi.Reply
	// Truncate: fewer bytes than the buffer holds are for the initiator, namely Reply.In.
	Truncate bool
}

// Complete tells the kernel how a command ended. From then on its pages are not ours. The kernel looks when it is woken.
func (r *Ring) Complete(id uint16, res Result) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.running[id/64]>>(id%64)&1 == 0 {
		return broken("command %d completed, which is not running", id)
	}
	e, err := r.slot()
	if err != nil {
		return err
	}
	r.running[id/64] &^= 1 << (id % 64)
	r.taken--
	ne := binary.NativeEndian
	ne.PutUint16(e[entID:], id)
	e[entFlags] = 0
	e[rspStatus] = byte(res.Status)
	clear(e[rspStatus+1 : minCommand])
	if res.Truncate && r.flags&CapReadLen != 0 && res.In > 0 {
		e[entFlags] = flagReadLen
		ne.PutUint32(e[rspReadLen:], uint32(res.In))
	}
	copy(e[rspSense:minCommand], res.Sense)
	r.tail = (r.tail + uint32(len(e))) % uint32(len(r.ring))
	r.word(offTail).Store(r.tail) // releases the response
	return nil
}

// slot returns the entry that the next response goes into: the first at the tail that brought a command, any command.
func (r *Ring) slot() ([]byte, error) {
	for {
		e, err := r.entry(r.tail)
		if err != nil {
			return nil, err
		}
		if binary.NativeEndian.Uint32(e)&opMask == opCommand {
			if len(e) < minCommand {
				return nil, broken("command entry of %d bytes", len(e))
			}
			return e, nil
		}
		r.tail = (r.tail + uint32(len(e))) % uint32(len(r.ring))
	}
}

// Outstanding returns how many commands have been taken and not completed.
func (r *Ring) Outstanding() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.taken
}

// idle reports whether Next has nothing to return.
func (r *Ring) idle() bool { return r.next.Load() == r.word(offHead).Load() }

// drained reports whether everything that the kernel put into the ring was completed.
func (r *Ring) drained() bool { return r.idle() && r.Outstanding() == 0 }
