package scsi

import "encoding/binary"

// portGroup is the number of the one target port group of a unit.
const portGroup = 1

// Access states of a target port group (SPC-4, 5.15.2).
const (
	stateOptimized    = 0x0
	stateNonOptimized = 0x1
	stateStandby      = 0x2
	stateUnavailable  = 0x3
)

// accessible refuses commands in a state that does not take them.
func (u *Unit) accessible() error {
	switch u.alua.Load() {
	case stateStandby:
		return &senseError{key: keyNotReady, code: codeStandby}
	case stateUnavailable:
		return &senseError{key: keyNotReady, code: codeUnavailable}
	}
	return nil
}

func (u *Unit) reportPortGroups(c *call) error {
	long := c.cdb[1]&0x20 != 0 // extended header
	if format := c.cdb[1] >> 5; format > 1 {
		return badField(1, 7)
	}
	b := make([]byte, 4, 24)
	if long {
		b = append(b, 0x10, 0, 0, 0) // length-only descriptor of an implicit transition time of 0
	}
	group := []byte{byte(u.alua.Load()), 0x0F, 0, portGroup, 0, 0x01, 0, 1, 0, 0, 0, 1}
	b = append(b, group...)
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	c.reply(b, binary.BigEndian.Uint32(c.cdb[6:]))
	return nil
}

// setPortGroups puts the group into another state at an initiator's wish.
func (u *Unit) setPortGroups(c *call) error {
	n := binary.BigEndian.Uint32(c.cdb[6:])
	if n == 0 {
		return nil
	}
	list := c.data.take(int(min(n, 4096)))
	if len(list) < 8 || (len(list)-4)%4 != 0 {
		return illegal(codeListLength)
	}
	state := u.alua.Load()
	for at := 4; at < len(list); at += 4 {
		want := list[at] & 0x0F
		if want > stateUnavailable {
			return badParameter(at)
		}
		if binary.BigEndian.Uint16(list[at+2:]) != portGroup {
			return badParameter(at + 2)
		}
		state = uint32(want)
	}
	u.alua.Store(state)
	return nil
}
