package nbddev

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
)

// The part of the protocol that comes before transmission.
const (
	magicInit   = 0x4e42444d41474943
	magicOption = 0x49484156454f5054
	magicReply  = 0x3e889045565a9

	flagFixed    = 1
	flagNoZeroes = 2

	optExportName = 1
	optGo         = 7

	replyAck      = 1
	replyInfo     = 3
	replyError    = 1 << 31
	errUnsup      = replyError | 1
	errTLSNeeded  = replyError | 5
	infoExport    = 0
	infoBlockSize = 3
	infoRequest   = infoBlockSize

	maxName  = 4096
	maxReply = 64 << 10
	// maxReplies bounds what a server may say before it gets to the point.
	maxReplies = 64
)

// FlagReadOnly is the transmission flag of an export that takes no changes.
const FlagReadOnly = 1 << 1

// Export is what a server says of an export.
type Export struct {
	Size  int64
	Flags uint16 // transmission flags
	// MinBlock is the smallest unit of a request, 0 if the server does not say.
	MinBlock uint32
}

// Handshake asks the server at the other end of c for an export, in plain text and without the parts of the protocol that
// the kernel does not speak, such as structured replies. When it returns nil, the connection is ready to be handed over.
func Handshake(c io.ReadWriter, export string) (Export, error) {
	x, err := handshake(c, export)
	if err != nil {
		return x, fmt.Errorf("asking for export %q: %w", export, err)
	}
	return x, nil
}

func handshake(c io.ReadWriter, export string) (Export, error) {
	var x Export
	if len(export) > maxName {
		return x, fmt.Errorf("a name has at most %d bytes", maxName)
	}
	hello, err := read(c, 18)
	if err != nil {
		return x, err
	}
	if binary.BigEndian.Uint64(hello) != magicInit || binary.BigEndian.Uint64(hello[8:]) != magicOption {
		return x, errors.New("this is no NBD server of today")
	}
	offered := binary.BigEndian.Uint16(hello[16:])
	flags := offered & (flagFixed | flagNoZeroes)
	if _, err := c.Write(binary.BigEndian.AppendUint32(nil, uint32(flags))); err != nil {
		return x, err
	}
	if offered&flagFixed == 0 {
		return byName(c, export, flags)
	}
	x, err = byGo(c, export)
	if errors.Is(err, errNoGo) {
		return byName(c, export, flags)
	}
	return x, err
}

var errNoGo = errors.New("the server does not know the option GO")

// byGo asks the way that servers can refuse with a reason.
func byGo(c io.ReadWriter, export string) (Export, error) {
	var x Export
	data := binary.BigEndian.AppendUint32(nil, uint32(len(export)))
	data = append(data, export...)
	data = binary.BigEndian.AppendUint16(data, 1)
	data = binary.BigEndian.AppendUint16(data, infoRequest)
	if err := option(c, optGo, data); err != nil {
		return x, err
	}
	known := false
	for range maxReplies {
		kind, data, err := reply(c)
		switch {
		case err != nil:
			return x, err
		case kind == replyAck && !known:
			return x, errors.New("the server does not say what the export is like")
		case kind == replyAck:
			return x, x.check()
		case kind == errUnsup:
			return x, errNoGo
		case kind == errTLSNeeded:
			return x, errors.New("the server insists on TLS, which the kernel does not do")
		case kind&replyError != 0:
			return x, fmt.Errorf("the server refuses (error %d): %q", kind&^replyError, data)
		case kind == replyInfo && x.info(data):
			known = true
		}
	}
	return x, errors.New("the server does not come to the point")
}

// info takes what a server tells, and reports whether that was what the export is like.
func (x *Export) info(data []byte) bool {
	if len(data) < 2 {
		return false
	}
	kind, data := binary.BigEndian.Uint16(data), data[2:]
	switch {
	case kind == infoExport && len(data) == 10:
		x.Size = sizeOf(binary.BigEndian.Uint64(data))
		x.Flags = binary.BigEndian.Uint16(data[8:])
		return true
	case kind == infoBlockSize && len(data) == 12:
		x.MinBlock = binary.BigEndian.Uint32(data)
	}
	return false
}

// sizeOf makes the size of an export one that check refuses if there is no such file.
func sizeOf(n uint64) int64 {
	if n > math.MaxInt64 {
		return -1
	}
	return int64(n)
}

func (x *Export) check() error {
	switch {
	case x.Size < 0:
		return errors.New("the export is longer than a device can be")
	case x.Flags&1 == 0:
		return errors.New("the server does not say what the export can do")
	}
	return nil
}

// byName asks the old way, to which a server that refuses can only hang up.
func byName(c io.ReadWriter, export string, flags uint16) (Export, error) {
	var x Export
	if err := option(c, optExportName, []byte(export)); err != nil {
		return x, err
	}
	size := 10
	if flags&flagNoZeroes == 0 {
		size += 124
	}
	p, err := read(c, size)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return x, errors.New("the server has hung up: it has no such export, or will not give it")
	}
	if err != nil {
		return x, err
	}
	x.Size = sizeOf(binary.BigEndian.Uint64(p))
	x.Flags = binary.BigEndian.Uint16(p[8:])
	return x, x.check()
}

func option(c io.Writer, opt uint32, data []byte) error {
	p := binary.BigEndian.AppendUint64(nil, magicOption)
	p = binary.BigEndian.AppendUint32(p, opt)
	p = binary.BigEndian.AppendUint32(p, uint32(len(data)))
	_, err := c.Write(append(p, data...))
	return err
}

func reply(c io.Reader) (kind uint32, data []byte, err error) {
	p, err := read(c, 20)
	if err != nil {
		return 0, nil, err
	}
	size := binary.BigEndian.Uint32(p[16:])
	if binary.BigEndian.Uint64(p) != magicReply || binary.BigEndian.Uint32(p[8:]) != optGo || size > maxReply {
		return 0, nil, errors.New("the server's answer cannot be understood")
	}
	data, err = read(c, int(size))
	return binary.BigEndian.Uint32(p[12:]), data, err
}

func read(c io.Reader, n int) ([]byte, error) {
	p := make([]byte, n)
	_, err := io.ReadFull(c, p)
	return p, err
}
