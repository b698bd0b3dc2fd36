package scsi

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/droverproject/drover/block"
)

// Options say what a unit is and what it is called.
type Options struct {
	BlockSize int // of a logical block: 512 or 4096; 0: 512
	// Serial identifies the unit to initiators, and its hexadecimal digits make its NAA name. It is asked for at every
	// INQUIRY: some transports learn it late.
	Serial func() string
	// Vendor, Product and Revision are shown by INQUIRY; empty: drover's own.
	Vendor, Product, Revision string
	// MaxTransfer is the largest transfer in blocks that initiators are told to use; 0: no limit. What is larger and gets here
	// all the same is done.
	MaxTransfer uint32
	ReadOnly    bool
	// Keep has what a write changed in the device's metadata made durable before the write is answered, so that nothing
	// acknowledged is lost when this process ends without a word: initiators do not notice, and send nothing again. Writes
	// that change no metadata (block.OverwriteDevice takes them) are in the host's page cache, which outlives the process.
	Keep bool
	// Peer finds the unit that an EXTENDED COPY names, by its NAA designator; nil: only the unit itself.
	Peer func(naa [16]byte) *Unit
}

// Unit is one logical unit: a disk. All methods may be called at once.
type Unit struct {
	dev      block.Device
	o        Options
	commands *catalogue
	shift    uint8 // of the block size

	locks regionLocks

	mode atomic.Uint32 // modeBits
	alua atomic.Uint32 // access state

	mu        sync.Mutex
	attention []code // what initiators have to be told, the oldest first

	tasks  tasks
	copies copyLog
	counts counters
}

// NewUnit makes a unit of a device. The device stays the caller's.
func NewUnit(dev block.Device, o Options) (*Unit, error) {
	if o.BlockSize == 0 {
		o.BlockSize = 512
	}
	u := &Unit{dev: dev, o: o, commands: newCatalogue()}
	switch o.BlockSize {
	case 512:
		u.shift = 9
	case 4096:
		u.shift = 12
	default:
		return nil, fmt.Errorf("logical blocks of %d bytes: there are only 512 and 4096", o.BlockSize)
	}
	if dev.Size()>>u.shift == 0 {
		return nil, errors.New("a disk needs at least one logical block")
	}
	if o.Serial == nil {
		u.o.Serial = func() string { return "" }
	}
	u.mode.Store(u.defaultMode())
	u.raise(codePowerOn)
	return u, nil
}

// Reply is what a command ends with.
type Reply struct {
	Status Status
	Sense  []byte // not empty with CheckCondition
	// In is how many bytes of the buffer hold data for the initiator. What is behind them must not be shown to it.
	In int
}

// call is one command under way.
type call struct {
	ctx  context.Context
	cdb  []byte
	data Buffer
	in   int
}

// reply gives the initiator a response of which it has allocated so many bytes for.
func (c *call) reply(p []byte, allocated uint32) {
	if uint32(len(p)) > allocated {
		p = p[:allocated]
	}
	c.in = c.data.put(p)
}

// Execute runs one command. The buffer holds what the initiator sent, or takes what it gets; both are never needed at once.
// If it is shorter than the command says, as much as it holds is transferred.
func (u *Unit) Execute(ctx context.Context, cdb []byte, data Buffer) Reply {
	c := &call{ctx: ctx, cdb: cdb, data: data}
	u.counts.inflight.Add(1)
	defer u.counts.inflight.Add(-1)
	if err := u.run(c); err != nil {
		sense := u.senseOf(err)
		u.counts.fail(sense)
		if sense == nil {
			return Reply{Status: Busy}
		}
		return Reply{Status: CheckCondition, Sense: sense.encode(u.modeIs(modeDescriptorSense)), In: c.in}
	}
	u.counts.done(cdb, data, c.in)
	return Reply{Status: Good, In: c.in}
}

func (u *Unit) run(c *call) error {
	cmd, err := u.commands.find(c.cdb)
	if err != nil {
		return err
	}
	if cmd.flags&always == 0 {
		if code, ok := u.nextAttention(); ok {
			return &senseError{key: keyUnitAttention, code: code}
		}
		if err := u.accessible(); err != nil {
			return err
		}
		if err := u.unavailable(); err != nil && (u.tasks.current.Load() != nil || !mendsFailure(cmd.op)) {
			return err
		}
	}
	if err := cmd.checkBits(c.cdb); err != nil {
		return err
	}
	if cmd.flags&writes != 0 && u.writeProtected() {
		return &senseError{key: keyDataProtect, code: codeWriteProtected}
	}
	if err := cmd.run(u, c); err != nil || cmd.flags&writes == 0 || !u.o.Keep {
		return err
	}
	if err := u.dev.Flush(c.ctx); err != nil {
		lba, _ := extent(c.cdb)
		return u.writeFailed(err, u.bytes(lba))
	}
	return nil
}

// senseOf turns an error of a command into sense data. nil: the initiator is to try again.
func (u *Unit) senseOf(err error) *senseError {
	var sense *senseError
	var failed *mediumError
	switch {
	case errors.As(err, &sense):
		return sense
	case errors.Is(err, block.ErrReadOnly):
		return &senseError{key: keyDataProtect, code: codeWriteProtected}
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return &senseError{key: keyDataProtect, code: codeSpaceExhausted}
	case errors.Is(err, block.ErrOutOfRange): // the disk has become smaller meanwhile
		return illegal(codeLBAOutOfRange)
	case errors.Is(err, block.ErrClosed), errors.Is(err, context.Canceled):
		return nil
	case errors.As(err, &failed):
		return withInfo(keyMediumError, failed.code, failed.lba)
	}
	return &senseError{key: keyHardwareError, code: codeInternalFailure}
}

// mediumError is a read or write that the device failed.
type mediumError struct {
	code code
	lba  uint64
	err  error
}

func (e *mediumError) Error() string { return e.err.Error() }
func (e *mediumError) Unwrap() error { return e.err }

// blocks returns the capacity in logical blocks.
func (u *Unit) blocks() uint64 { return uint64(u.dev.Size()) >> u.shift }

func (u *Unit) bytes(blocks uint64) int64 { return int64(blocks << u.shift) }

func (u *Unit) writeProtected() bool {
	return u.o.ReadOnly || u.dev.Info().ReadOnly || u.modeIs(modeWriteProtect)
}

// CapacityChanged has the next command told that the disk has another size.
func (u *Unit) CapacityChanged() { u.raise(codeCapacityChanged) }

// Reset forgets what an initiator set and has the next command told so.
func (u *Unit) Reset() {
	u.mode.Store(u.defaultMode())
	u.mu.Lock()
	u.attention = nil
	u.mu.Unlock()
	u.raise(codePowerOn)
}

// raise queues a unit attention, once for each code.
func (u *Unit) raise(c code) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, have := range u.attention {
		if have == c {
			return
		}
	}
	u.attention = append(u.attention, c)
}

func (u *Unit) nextAttention() (code, bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.attention) == 0 {
		return 0, false
	}
	c := u.attention[0]
	u.attention = u.attention[1:]
	return c, true
}
