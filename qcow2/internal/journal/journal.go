// Package journal keeps what the mapping of an image has become since the last flush in memory that outlives the process,
// though not the host: a file on a tmpfs, mapped shared. Data that was acknowledged is in the host's page cache when a
// process is killed; where it lies on the host is what would be lost, and is what a record says.
//
// # Order
//
// A record is appended before the entries change that it is about, both within the section that a flush's freezing of those
// entries excludes, and when they are among what the next flush is going to freeze. So what anybody can see, and build on, is
// recorded; and what a flush did not freeze was recorded after that flush had cut the journal.
//
// There are two halves. Records go to one; a flush that begins makes the other one the active one (Cut), and clears the
// one that was when all it froze is durable (Done). In the same section as the cut it takes the references that were given
// up so far: a cluster that a flush frees was given up before the cut, and named, if ever, before that; so no record names it
// when it is handed out again. After a flush that failed (Failed) nothing is recorded until one succeeds.
//
// What could not be recorded, because a half is full or there is no memory at all, is Outstanding until a flush has made it
// durable. Nobody who may have built on it is answered before.
//
// A half is cleared by one store: of its era, which its records carry. A record that was being written when the process ended
// has no valid checksum; it belonged to a request that had not been answered.
package journal

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"sync"
	"sync/atomic"
	"unsafe"
)

// Record says what the entries of N guest clusters from Cluster on have become: the words Word, Word+Step, Word+2*Step, and
// so on, each with the same Bitmap.
type Record struct {
	Cluster      uint64
	N            uint32
	Step         uint32
	Word, Bitmap uint64
}

// The layout of the memory: a header, then the two halves. Numbers are in the order of the host, which does not change.
const (
	offMagic    = 0  // u64, written last: without it nothing else counts
	offVersion  = 8  // u32
	offCapacity = 12 // u32: records of a half
	offNonce    = 16 // u32
	offSum      = 20 // u32: of the bytes from offVersion to offSum, and of the identity
	offIdentity = 24
	offEras     = 128 // u64 each, on cache lines of their own
	eraStride   = 64
	headerSize  = 4096

	recSum     = 0 // u32, never 0 in a whole record
	recIndex   = 4 // u32
	recEra     = 8
	recCluster = 16
	recN       = 24 // u32
	recStep    = 28 // u32
	recWord    = 32
	recBitmap  = 40
	recordSize = 48

	magic   = uint64(0x31306c6e726a7264) // "drjrnl01"
	version = 1
)

// Size returns how much memory a journal takes whose halves hold that many records each.
func Size(records int) int64 { return headerSize + 2*int64(records)*recordSize }

// MinSize is the least memory that a journal works with.
const MinSize = headerSize + 2*recordSize

// Identity tells which image on which boot of which host a journal belongs to.
type Identity [sha256.Size]byte

var (
	// ErrForeign is returned by Read for a journal of another image or of another boot of the host.
	ErrForeign = errors.New("journal belongs to another image, or was made before the host was started")
	// ErrDamaged is wrapped by Read's other errors.
	ErrDamaged = errors.New("journal is damaged")
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sum is a checksum that is never 0.
func sum(b ...[]byte) uint32 {
	c := uint32(0)
	for _, p := range b {
		c = crc32.Update(c, castagnoli, p)
	}
	return max(c, 1)
}

// Found is what an earlier process left.
type Found struct {
	Nonce   uint32
	Records []Record // as they were made, one after the other
}

// Read returns what an earlier process left in mem: nothing if no journal was begun there. It changes nothing.
func Read(mem []byte, id Identity) (Found, error) {
	ne := binary.NativeEndian
	if err := usable(mem); err != nil {
		return Found{}, err
	}
	if ne.Uint64(mem[offMagic:]) != magic {
		return Found{}, nil
	}
	if ne.Uint32(mem[offSum:]) != headerSum(mem) {
		return Found{}, fmt.Errorf("%w: its header has another checksum", ErrDamaged)
	}
	if v := ne.Uint32(mem[offVersion:]); v != version {
		return Found{}, fmt.Errorf("%w: version %d, and %d is known", ErrDamaged, v, version)
	}
	if Identity(mem[offIdentity:][:len(id)]) != id {
		return Found{}, ErrForeign
	}
	f := Found{Nonce: ne.Uint32(mem[offNonce:])}
	n := int(ne.Uint32(mem[offCapacity:]))
	if Size(n) > int64(len(mem)) {
		return Found{}, fmt.Errorf("%w: two halves of %d records in %d bytes", ErrDamaged, n, len(mem))
	}
	first := 0
	if eraOf(mem, 1).Load() < eraOf(mem, 0).Load() {
		first = 1
	}
	for _, half := range []int{first, 1 - first} {
		if err := f.readHalf(mem, half, n); err != nil {
			return Found{}, err
		}
	}
	return f, nil
}

// readHalf gathers the records of a half. They were written one after the other: behind one that is not whole comes no other.
func (f *Found) readHalf(mem []byte, half, n int) error {
	era := eraOf(mem, half).Load()
	end := n
	for i := range n {
		r, whole := decode(mem[headerSize+int64(half*n+i)*recordSize:][:recordSize], era, i)
		if whole && i > end {
			return fmt.Errorf("%w: record %d of half %d is not whole and there are more behind it", ErrDamaged, end, half)
		}
		if !whole {
			end = min(end, i)
			continue
		}
		f.Records = append(f.Records, r)
	}
	return nil
}

func usable(mem []byte) error {
	if len(mem) < MinSize || uintptr(unsafe.Pointer(unsafe.SliceData(mem)))%8 != 0 {
		return fmt.Errorf("memory for a journal: %d bytes, aligned to 8, are needed", MinSize)
	}
	return nil
}

func headerSum(mem []byte) uint32 {
	return sum(mem[offVersion:offSum], mem[offIdentity:][:sha256.Size])
}

func eraOf(mem []byte, half int) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Pointer(&mem[offEras+half*eraStride]))
}

func decode(b []byte, era uint64, index int) (r Record, whole bool) {
	ne := binary.NativeEndian
	s := ne.Uint32(b[recSum:])
	if s == 0 || s != sum(b[recIndex:recordSize]) || ne.Uint64(b[recEra:]) != era || ne.Uint32(b[recIndex:]) != uint32(index) {
		return Record{}, false
	}
	return Record{ne.Uint64(b[recCluster:]), ne.Uint32(b[recN:]), ne.Uint32(b[recStep:]), ne.Uint64(b[recWord:]),
		ne.Uint64(b[recBitmap:])}, true
}

// Clear has what is in mem end to count.
func Clear(mem []byte) { (*atomic.Uint64)(unsafe.Pointer(&mem[offMagic])).Store(0) }

// Journal is a journal that is being kept.
type Journal struct {
	mu       sync.Mutex
	mem      []byte // nil: there is none, nothing can be recorded
	capacity int
	used     [2]int
	active   int
	stuck    bool   // a flush failed: both halves are needed
	still    bool   // what changes is made durable by whoever changes it
	off      bool   // nothing is recorded for now
	eras     uint64 // the last one given out

	unrecorded atomic.Uint64 // changes
	covered    atomic.Uint64 // of them, how many are durable
	atCut      uint64

	wake chan struct{}
}

// None returns a journal without memory: every change is outstanding until it is flushed.
func None() *Journal { return &Journal{wake: make(chan struct{}, 1)} }

// Start begins an empty journal in mem. What is there is lost.
func Start(mem []byte, id Identity, nonce uint32) (*Journal, error) {
	if err := usable(mem); err != nil {
		return nil, err
	}
	j := None()
	j.mem, j.capacity = mem, int((int64(len(mem))-headerSize)/(2*recordSize))
	Clear(mem) // with one store
	clear(mem[offVersion:])
	ne := binary.NativeEndian
	ne.PutUint32(mem[offVersion:], version)
	ne.PutUint32(mem[offCapacity:], uint32(j.capacity))
	ne.PutUint32(mem[offNonce:], nonce)
	copy(mem[offIdentity:], id[:])
	ne.PutUint32(mem[offSum:], headerSum(mem))
	j.clearHalf(0)
	j.clearHalf(1)
	(*atomic.Uint64)(unsafe.Pointer(&mem[offMagic])).Store(magic)
	return j, nil
}

// clearHalf makes a half empty, with one store, and the younger of the two.
func (j *Journal) clearHalf(half int) {
	j.eras++
	j.used[half] = 0
	eraOf(j.mem, half).Store(j.eras)
}

// clearBoth makes both halves empty. The older one goes first: what it holds would undo what the younger one says.
func (j *Journal) clearBoth() {
	older := 0
	if eraOf(j.mem, 1).Load() < eraOf(j.mem, 0).Load() {
		older = 1
	}
	j.clearHalf(older)
	j.clearHalf(1 - older)
	j.active, j.stuck = older, false
}

// Append records a change that is about to be made, or counts it as outstanding.
func (j *Journal) Append(r Record) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.still {
		return
	}
	if j.mem == nil || j.stuck || j.off || j.used[j.active] == j.capacity {
		j.unrecorded.Add(1)
		return
	}
	i := j.used[j.active]
	j.encode(r, j.active, i)
	j.used[j.active]++
	if i == j.capacity/2 {
		j.wakeUp()
	}
}

func (j *Journal) encode(r Record, half, i int) {
	ne := binary.NativeEndian
	b := j.mem[headerSize+int64(half*j.capacity+i)*recordSize:][:recordSize]
	whole := (*atomic.Uint32)(unsafe.Pointer(&b[recSum]))
	whole.Store(0)
	ne.PutUint32(b[recIndex:], uint32(i))
	ne.PutUint64(b[recEra:], eraOf(j.mem, half).Load())
	ne.PutUint64(b[recCluster:], r.Cluster)
	ne.PutUint32(b[recN:], r.N)
	ne.PutUint32(b[recStep:], r.Step)
	ne.PutUint64(b[recWord:], r.Word)
	ne.PutUint64(b[recBitmap:], r.Bitmap)
	whole.Store(sum(b[recIndex:]))
}

// Miss counts a change that no record can express.
func (j *Journal) Miss() {
	j.mu.Lock()
	defer j.mu.Unlock()
	if !j.still {
		j.unrecorded.Add(1)
	}
}

// Outstanding reports whether there are changes that are neither recorded nor durable.
func (j *Journal) Outstanding() bool { return j.covered.Load() != j.unrecorded.Load() }

// Wake is sent to when a flush should run soon, lest the journal be full.
func (j *Journal) Wake() <-chan struct{} { return j.wake }

func (j *Journal) wakeUp() {
	select {
	case j.wake <- struct{}{}:
	default:
	}
}

// Cut begins the other half, for a flush that is about to freeze what it writes, and runs fn before anything more is
// recorded. Done or Failed follows.
func (j *Journal) Cut(fn func()) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.mem != nil && !j.stuck {
		j.active = 1 - j.active // which is empty
	}
	j.atCut = j.unrecorded.Load()
	fn()
}

// Done says that everything that was to be recorded before the cut is durable.
func (j *Journal) Done() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.covered.Store(j.atCut)
	switch {
	case j.mem == nil:
	case j.stuck: // nothing was recorded since the cut
		j.clearBoth()
	default:
		j.clearHalf(1 - j.active)
	}
}

// Failed says that what was to be recorded before the cut may not be durable.
func (j *Journal) Failed() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.stuck = true
}

// Hold has changes not recorded for a while, by whoever makes them durable before anybody else sees them.
func (j *Journal) Hold() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.still = true
}

// Resume undoes Hold. Unless record is set, every change is outstanding from now on until it is flushed.
func (j *Journal) Resume(record bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.still, j.off = false, !record
}

// Detach ends the use of the memory.
func (j *Journal) Detach() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.mem = nil
}

// Snapshot returns a copy of the memory as it would be if the process ended now; nil when there is none.
func (j *Journal) Snapshot() []byte {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.mem == nil {
		return nil
	}
	return append([]byte(nil), j.mem...)
}
