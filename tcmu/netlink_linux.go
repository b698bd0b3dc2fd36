package tcmu

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
)

// The generic netlink family of the kernel's TCMU (target_core_user.h).
const (
	familyName    = "TCM-USER"
	groupName     = "config"
	familyVersion = 2

	cmdAdded       = 1
	cmdRemoved     = 2
	cmdReconfig    = 3
	doneAfter      = 3 // the number of a command's answer is that much higher
	cmdSetFeatures = 7

	attrDevice     = 1
	attrMinor      = 2
	attrConfig     = 4
	attrSize       = 5
	attrWriteCache = 6
	attrStatus     = 7
	attrDeviceID   = 8
	attrReply      = 9
)

// receiveBuffer is what the kernel may queue for us before it drops notices: some thousand of them.
const receiveBuffer = 8 << 20

// ErrNoTCMU is wrapped by the errors of a kernel without TCM-User.
var ErrNoTCMU = errors.New("the kernel has no TCM-User target (modprobe target_core_user)")

// Event is a notice from the kernel about a device. Each is to be answered once, with Answer.
type Event struct {
	Command  uint8
	DeviceID uint32
	Minor    int
	// Of a reconfiguration exactly one is set.
	Config     *string
	Size       *uint64
	WriteCache *bool
}

// Events is the connection that the kernel tells of devices through.
type Events struct {
	conn   *genetlink.Conn
	family genetlink.Family
}

// DialEvents connects, and has the kernel wait for answers.
func DialEvents() (*Events, error) {
	conn, err := genetlink.Dial(nil)
	if err != nil {
		return nil, fmt.Errorf("opening a netlink socket: %w", err)
	}
	e := &Events{conn: conn}
	if err := e.join(); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return e, nil
}

func (e *Events) join() error {
	family, err := e.conn.GetFamily(familyName)
	if errors.Is(err, fs.ErrNotExist) {
		return ErrNoTCMU
	}
	if err != nil {
		return fmt.Errorf("looking up the netlink family %s: %w", familyName, err)
	}
	e.family = family
	// A burst of devices must not be dropped; what is dropped all the same, a rescan finds.
	if err := e.conn.SetReadBuffer(receiveBuffer); err != nil {
		return fmt.Errorf("enlarging the netlink receive buffer: %w", err)
	}
	if err := e.conn.SetOption(netlink.NoENOBUFS, true); err != nil {
		return fmt.Errorf("setting up the netlink socket: %w", err)
	}
	for _, g := range family.Groups {
		if g.Name == groupName {
			if err := e.conn.JoinGroup(g.ID); err != nil {
				return fmt.Errorf("joining the netlink group %s: %w", groupName, err)
			}
			return e.setFeatures()
		}
	}
	return fmt.Errorf("the netlink family %s has no group %s", familyName, groupName)
}

// setFeatures has the kernel wait for an answer to each of its notices.
func (e *Events) setFeatures() error {
	enc := netlink.NewAttributeEncoder()
	enc.Uint8(attrReply, 1)
	if err := e.send(cmdSetFeatures, enc); err != nil {
		return fmt.Errorf("having the kernel wait for answers: %w", err)
	}
	return nil
}

func (e *Events) send(command uint8, enc *netlink.AttributeEncoder) error {
	data, err := enc.Encode()
	if err != nil {
		return err
	}
	m := genetlink.Message{Header: genetlink.Header{Command: command, Version: familyVersion}, Data: data}
	_, err = e.conn.Send(m, e.family.ID, netlink.Request)
	return err
}

// Receive waits for notices.
func (e *Events) Receive() ([]Event, error) {
	msgs, _, err := e.conn.Receive()
	if err != nil {
		return nil, fmt.Errorf("receiving from the kernel: %w", err)
	}
	var events []Event
	for _, m := range msgs {
		if m.Header.Command < cmdAdded || m.Header.Command > cmdReconfig {
			continue
		}
		ev, err := parseEvent(m.Header.Command, m.Data)
		if err != nil {
			return events, err
		}
		events = append(events, ev)
	}
	return events, nil
}

func parseEvent(command uint8, data []byte) (Event, error) {
	ev := Event{Command: command, Minor: -1}
	dec, err := netlink.NewAttributeDecoder(data)
	if err != nil {
		return ev, fmt.Errorf("decoding a notice from the kernel: %w", err)
	}
	for dec.Next() {
		switch dec.Type() {
		case attrMinor:
			ev.Minor = int(dec.Uint32())
		case attrDeviceID:
			ev.DeviceID = dec.Uint32()
		case attrConfig:
			s := dec.String()
			ev.Config = &s
		case attrSize:
			n := dec.Uint64()
			ev.Size = &n
		case attrWriteCache:
			on := dec.Uint8() != 0
			ev.WriteCache = &on
		}
	}
	if err := dec.Err(); err != nil {
		return ev, fmt.Errorf("decoding a notice from the kernel: %w", err)
	}
	return ev, nil
}

// Answer answers a notice: 0, or a negative error number that whoever configured the device sees.
func (e *Events) Answer(command uint8, deviceID uint32, status int32) error {
	enc := netlink.NewAttributeEncoder()
	enc.Uint32(attrDeviceID, deviceID)
	enc.Int32(attrStatus, status)
	if err := e.send(command+doneAfter, enc); err != nil {
		return fmt.Errorf("answering the kernel: %w", err)
	}
	return nil
}

// Close closes the connection; Receive ends.
func (e *Events) Close() error { return e.conn.Close() }
