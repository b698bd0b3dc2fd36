package nbddev

import (
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// The generic netlink family of the kernel's NBD client (linux/nbd-netlink.h).
const (
	familyName    = "nbd"
	groupName     = "nbd_mc_group"
	familyVersion = 1

	cmdConnect     = 1
	cmdDisconnect  = 2
	cmdReconfigure = 3
	cmdLinkDead    = 4
	cmdStatus      = 5

	attrIndex       = 1
	attrSize        = 2
	attrBlockSize   = 3
	attrTimeout     = 4
	attrServerFlags = 5
	attrClientFlags = 6
	attrSockets     = 7
	attrDeadTimeout = 8
	attrDevices     = 9
	attrIdentifier  = 10

	attrSocket   = 1 // in attrSockets
	attrSocketFD = 1 // in attrSocket

	attrDevice          = 1 // in attrDevices
	attrDeviceIndex     = 1 // in attrDevice
	attrDeviceConnected = 2

	clientDisconnectOnClose = 1 << 1
)

// transport is the netlink socket.
type transport interface {
	GetFamily(name string) (genetlink.Family, error)
	Execute(m genetlink.Message, family uint16, flags netlink.HeaderFlags) ([]genetlink.Message, error)
	JoinGroup(group uint32) error
	Receive() ([]genetlink.Message, []netlink.Message, error)
	Close() error
}

// Control is a connection to the kernel's NBD client.
type Control struct {
	conn   transport
	family genetlink.Family
}

// Open connects to the kernel's NBD client. The error wraps ErrUnsupported if there is none.
func Open() (*Control, error) {
	conn, err := genetlink.Dial(nil)
	if err != nil {
		return nil, fmt.Errorf("opening a netlink socket: %w", err)
	}
	c, err := open(conn)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return c, nil
}

func open(conn transport) (*Control, error) {
	family, err := conn.GetFamily(familyName)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, ErrUnsupported
	case err != nil:
		return nil, fmt.Errorf("looking up the netlink family %s: %w", familyName, err)
	}
	return &Control{conn, family}, nil
}

// Close closes the connection. Devices stay as they are.
func (c *Control) Close() error { return c.conn.Close() }

// Connect makes a device of connections to a server, which have all been brought to the same export by Handshake. The kernel
// keeps their sockets: the caller may close what it has of them. It returns the index of the device.
func (c *Control) Connect(cfg Config, sockets []int) (int, error) {
	if len(sockets) == 0 {
		return 0, errors.New("connecting a device: no connections")
	}
	enc := netlink.NewAttributeEncoder()
	if cfg.Index != AnyIndex {
		enc.Uint32(attrIndex, uint32(cfg.Index))
	}
	enc.Uint64(attrSize, uint64(cfg.Size))
	enc.Uint64(attrBlockSize, uint64(cfg.blockSize()))
	enc.Uint64(attrServerFlags, uint64(cfg.Flags))
	if cfg.DisconnectOnClose {
		enc.Uint64(attrClientFlags, clientDisconnectOnClose)
	}
	encodeTimes(enc, cfg)
	encodeSockets(enc, sockets)
	if cfg.Identifier != "" {
		enc.String(attrIdentifier, cfg.Identifier)
	}
	answers, err := c.execute(cmdConnect, enc)
	if err != nil {
		return 0, fmt.Errorf("connecting %s: %w", DeviceName(cfg.Index), err)
	}
	for _, m := range answers {
		if index, ok := indexIn(m.Data); ok {
			return index, nil
		}
	}
	if cfg.Index == AnyIndex {
		return 0, errors.New("connecting a device: the kernel does not say which")
	}
	return cfg.Index, nil
}

// encodeTimes adds the bounds, which the kernel has in seconds.
func encodeTimes(enc *netlink.AttributeEncoder, cfg Config) {
	if cfg.Timeout > 0 {
		enc.Uint64(attrTimeout, seconds(cfg.Timeout))
	}
	if cfg.DeadTimeout > 0 {
		enc.Uint64(attrDeadTimeout, seconds(cfg.DeadTimeout))
	}
}

// seconds rounds up: a time that is not quite nothing must not become none.
func seconds(d time.Duration) uint64 { return uint64((d + time.Second - 1) / time.Second) }

func encodeSockets(enc *netlink.AttributeEncoder, sockets []int) {
	enc.Nested(attrSockets, func(list *netlink.AttributeEncoder) error {
		for _, fd := range sockets {
			list.Nested(attrSocket, func(item *netlink.AttributeEncoder) error {
				item.Uint32(attrSocketFD, uint32(fd))
				return nil
			})
		}
		return nil
	})
}

// Reconnect puts new connections in place of those of a device that died, with the times of cfg and its Identifier.
func (c *Control) Reconnect(cfg Config, sockets []int) error {
	enc := netlink.NewAttributeEncoder()
	enc.Uint32(attrIndex, uint32(cfg.Index))
	encodeTimes(enc, cfg)
	encodeSockets(enc, sockets)
	if cfg.Identifier != "" {
		enc.String(attrIdentifier, cfg.Identifier)
	}
	if _, err := c.execute(cmdReconfigure, enc); err != nil {
		return fmt.Errorf("reconnecting %s: %w", DeviceName(cfg.Index), err)
	}
	return nil
}

// Disconnect ends what Connect began.
func (c *Control) Disconnect(index int) error {
	enc := netlink.NewAttributeEncoder()
	enc.Uint32(attrIndex, uint32(index))
	if _, err := c.execute(cmdDisconnect, enc); err != nil {
		return fmt.Errorf("disconnecting %s: %w", DeviceName(index), err)
	}
	return nil
}

// Status lists the devices that there are.
func (c *Control) Status() ([]Status, error) {
	answers, err := c.execute(cmdStatus, netlink.NewAttributeEncoder())
	if err != nil {
		return nil, fmt.Errorf("asking for the state of the devices: %w", err)
	}
	var list []Status
	for _, m := range answers {
		if err := decodeDevices(m.Data, &list); err != nil {
			return nil, fmt.Errorf("asking for the state of the devices: %w", err)
		}
	}
	return list, nil
}

func decodeDevices(data []byte, list *[]Status) error {
	dec, err := netlink.NewAttributeDecoder(data)
	if err != nil {
		return err
	}
	for dec.Next() {
		if dec.Type() != attrDevices {
			continue
		}
		dec.Nested(func(devices *netlink.AttributeDecoder) error {
			for devices.Next() {
				if devices.Type() == attrDevice {
					devices.Nested(func(one *netlink.AttributeDecoder) error {
						var s Status
						for one.Next() {
							switch one.Type() {
							case attrDeviceIndex:
								s.Index = int(one.Uint32())
							case attrDeviceConnected:
								s.Connected = one.Uint8() != 0
							}
						}
						*list = append(*list, s)
						return nil
					})
				}
			}
			return nil
		})
	}
	return dec.Err()
}

// Watch has Receive tell of connections that die.
func (c *Control) Watch() error {
	for _, g := range c.family.Groups {
		if g.Name == groupName {
			if err := c.conn.JoinGroup(g.ID); err != nil {
				return fmt.Errorf("joining the netlink group %s: %w", groupName, err)
			}
			return nil
		}
	}
	return fmt.Errorf("the netlink family %s has no group %s", familyName, groupName)
}

// Receive waits until connections of devices die, and returns the indexes of those devices. A connection with Watch is of no
// other use.
func (c *Control) Receive() ([]int, error) {
	msgs, _, err := c.conn.Receive()
	if err != nil {
		return nil, fmt.Errorf("receiving from the kernel: %w", err)
	}
	var dead []int
	for _, m := range msgs {
		if index, ok := indexIn(m.Data); ok && m.Header.Command == cmdLinkDead {
			dead = append(dead, index)
		}
	}
	return dead, nil
}

func indexIn(data []byte) (int, bool) {
	dec, err := netlink.NewAttributeDecoder(data)
	if err != nil {
		return 0, false
	}
	for dec.Next() {
		if dec.Type() == attrIndex {
			index := dec.Uint32()
			return int(index), dec.Err() == nil
		}
	}
	return 0, false
}

func (c *Control) execute(command uint8, enc *netlink.AttributeEncoder) ([]genetlink.Message, error) {
	data, err := enc.Encode()
	if err != nil {
		return nil, err
	}
	m := genetlink.Message{Header: genetlink.Header{Command: command, Version: familyVersion}, Data: data}
	flags := netlink.Request
	if command != cmdConnect && command != cmdStatus {
		// An acknowledgement behind an answer would be found by the next request, in place of its own.
		flags |= netlink.Acknowledge
	}
	answers, err := c.conn.Execute(m, c.family.ID, flags)
	switch {
	case errors.Is(err, unix.EBUSY):
		return nil, fmt.Errorf("%w: %w", ErrBusy, err)
	case errors.Is(err, unix.EINVAL) && command == cmdDisconnect, errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return nil, fmt.Errorf("%w: %w", ErrNotConnected, err)
	}
	return answers, err
}
